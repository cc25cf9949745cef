import logging
from dataclasses import dataclass

import pytest

from phsa_megatron.config.document_flops import StepFlops
from phsa_megatron.monitoring.metrics import lookup
from phsa_megatron.monitoring.throughput import WINDOW_UPDATES, Throughput


@dataclass
class Facts:
    total_tokens: int = 100_000
    tokens_per_step: int = 1_000
    total_sequences: int = 100
    flops_per_token_selected: float = 2e9
    flops_per_token_dense: float = 6e9
    world_size: int = 2


def flops(tokens):
    """Documents of half the sequence length: fewer FLOPs a token than Facts says of full ones."""
    return StepFlops(selected=int(1.5e9) * tokens, dense=4 * 10**9 * tokens)


class Speed(Throughput):
    """Hands over the FLOPs of the tokens."""

    def update(self, seconds, tokens):
        return super().update(seconds, tokens, flops(tokens))


def test_both_flop_numbers_follow_their_formulas():
    speed = Speed(Facts(), consumed_tokens=0, peak_tflops=4.0)
    values = speed.update(seconds=2.0, tokens=4_000)
    assert values["perf/tokens_per_s"] == 2_000
    assert values["perf/step_time_s"] == pytest.approx(0.5)
    assert values["perf/dense_equiv_tflops"] == pytest.approx(2_000 * 4e9 / 2 / 1e12)
    assert values["perf/mfu_selected_frac"] == pytest.approx(2_000 * 1.5e9 / 2 / 4e12)
    assert values["progress/eta_s"] == pytest.approx(96_000 / 2_000)


def test_every_name_is_in_the_metrics_table():
    for name in Speed(Facts(), consumed_tokens=0, peak_tflops=4.0).update(2.0, 4_000):
        lookup(name)


def test_without_a_peak_there_is_no_utilization():
    assert "perf/mfu_selected_frac" not in Speed(Facts(), consumed_tokens=0).update(1.0, 1_000)


def test_utilization_above_one_is_left_out_and_said_once(caplog):
    speed = Speed(Facts(), consumed_tokens=0, peak_tflops=1e-3)
    with caplog.at_level(logging.WARNING):
        first, second = speed.update(1.0, 4_000), speed.update(1.0, 4_000)
    assert "perf/mfu_selected_frac" not in first and "perf/mfu_selected_frac" not in second
    assert "perf/dense_equiv_tflops" in second
    assert len(caplog.records) == 1
    assert "cluster.peak_tflops=0.001 is too small" in caplog.text


def test_warm_up_leaves_the_average_with_the_second_update():
    speed = Speed(Facts(), consumed_tokens=0)
    assert speed.update(100.0, 1_000)["perf/tokens_per_s"] == 10
    assert speed.update(1.0, 1_000)["perf/tokens_per_s"] == 1_000


def test_speed_is_smoothed_over_a_window_and_forgets_what_left_it():
    speed = Speed(Facts(total_tokens=10**9), consumed_tokens=0)
    speed.update(1.0, 1_000)
    for _ in range(WINDOW_UPDATES):
        speed.update(1.0, 1_000)
    assert 900 < speed.update(2.0, 1_000)["perf/tokens_per_s"] < 1_000
    for _ in range(WINDOW_UPDATES):
        values = speed.update(2.0, 1_000)
    assert values["perf/tokens_per_s"] == 500


def test_time_left_counts_the_tokens_of_before_a_resume():
    fresh = Speed(Facts(), consumed_tokens=0).update(1.0, 1_000)["progress/eta_s"]
    resumed = Speed(Facts(), consumed_tokens=50_000).update(1.0, 1_000)["progress/eta_s"]
    assert (fresh, resumed) == (99.0, 49.0)


@pytest.mark.parametrize(("seconds", "tokens"), [(0.0, 10), (1.0, 0), (-1.0, 10)])
def test_nothing_measured_is_refused(seconds, tokens):
    with pytest.raises(ValueError, match="above 0"):
        Speed(Facts(), consumed_tokens=0).update(seconds, tokens)


def test_utilization_is_that_of_the_window_not_of_the_last_record():
    speed = Throughput(Facts(), consumed_tokens=0, peak_tflops=4.0)
    speed.update(9.0, 10, StepFlops(1, 1))  # warm-up
    speed.update(1.0, 1_000, StepFlops(2 * 10**12, 10**12))
    values = speed.update(3.0, 1_000, StepFlops(4 * 10**12, 3 * 10**12))
    assert values["perf/mfu_selected_frac"] == pytest.approx(6 / (4 * 2 * 4))
    assert values["perf/dense_equiv_tflops"] == pytest.approx(4 / (4 * 2))


def test_formulas_are_told_with_the_numbers_of_the_run():
    with_peak = "\n".join(Speed(Facts(), consumed_tokens=0, peak_tflops=4.0).equations())
    assert "peak = cluster.peak_tflops = 4 TFLOP/s a device" in with_peak
    assert "devices = 2" in with_peak and "2e+09 FLOPs a token" in with_peak and "6e+09" in with_peak
    assert "causal factor = n (n + 1) / 2 of n x n (query, key) pairs = 0.50050 at n = 1,000" in with_peak
    assert "cluster.peak_tflops is not set" in "\n".join(Speed(Facts(), consumed_tokens=0).equations())
