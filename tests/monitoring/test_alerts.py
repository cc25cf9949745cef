import json
import math
import random

import pytest

from phsa_megatron.config.schema import AlertsConfig
from phsa_megatron.monitoring.alerts import (
    LOSS_HISTORY,
    Alert,
    SpeedRule,
    SpikeRule,
    StragglerRule,
    read_alerts,
    write_alert,
)


def _falling(num_steps, noise_nats=0.05, seed=3):
    generator = random.Random(seed)
    return [3 + 5 * math.exp(-s / 80) + generator.gauss(0, noise_nats) for s in range(1, num_steps + 1)]


def _alerts(rule, losses):
    return [alert for step, loss in enumerate(losses, 1) if (alert := rule.see(step, loss)) is not None]


def test_a_spike_is_told_once_at_its_first_step_and_again_after_it_was_over():
    losses = _falling(400)
    for step in (301, 302, 303, 350):
        losses[step - 1] += 1.0
    assert [alert.step for alert in _alerts(SpikeRule(AlertsConfig()), losses)] == [301, 350]
    (first, _) = _alerts(SpikeRule(AlertsConfig()), losses)
    assert first.kind == "loss_spike" and first.fields["loss_nats"] == losses[300]
    assert f"at step 301 is {losses[300] - first.fields['median_nats']:.3f} nats above" in first.text


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_curve_raises_nothing_nor_does_a_noisy_one(seed):
    assert _alerts(SpikeRule(AlertsConfig()), _falling(600, seed=seed)) == []
    # Noise of 0.3 nats reaches the smallest rise often; the robust deviation keeps it quiet.
    assert _alerts(SpikeRule(AlertsConfig()), _falling(600, 0.3, seed=seed)) == []
    assert _alerts(SpikeRule(AlertsConfig(loss_spike_sigmas=0.5)), _falling(600, 0.3, seed=seed)) != []


def test_a_new_level_becomes_normal():
    losses = [2.0] * 100 + [3.0] * (2 * LOSS_HISTORY) + [4.0]
    assert [alert.step for alert in _alerts(SpikeRule(AlertsConfig()), losses)] == [101, 301]


def test_nothing_is_said_before_there_is_something_to_compare_with():
    assert _alerts(SpikeRule(AlertsConfig()), [2.0] * 10 + [9.0] + [2.0] * 5) == []


def test_lost_speed_is_told_after_the_patience_and_once():
    rule = SpeedRule(AlertsConfig(patience_records=3))
    times = [1.0] * 10 + [2.0, 1.0] + [2.0] * 6 + [1.0] + [2.0] * 3
    told = [step for step, s in enumerate(times, 1) if rule.see(step, s) is not None]
    assert told == [15, 22]


def test_a_slow_first_record_does_not_count_and_noise_is_no_drop():
    rule = SpeedRule(AlertsConfig())
    assert all(rule.see(i, s) is None for i, s in enumerate([30.0, 1.0, 1.1, 1.0, 1.3, 0.9, 1.35, 1.4, 1.2]))


def test_a_straggler_must_be_the_same_process_and_hold_up_the_step():
    rule = StragglerRule(AlertsConfig(patience_records=3, straggler_ratio=1.5))
    seen = [
        rule.see(1, 4, 2.0, 0.5, 1.0), rule.see(2, 5, 2.0, 0.5, 1.0), rule.see(3, 4, 2.0, 0.5, 1.0),
        rule.see(4, 4, 2.0, 0.5, 1.0), rule.see(5, 4, 2.0, 0.5, 1.0), rule.see(6, 4, 2.0, 0.5, 1.0),
    ]  # fmt: skip
    assert [alert is not None for alert in seen] == [False] * 4 + [True, False]
    assert seen[4].fields["straggler_rank"] == 4 and "rank 4 takes 2.00 times" in seen[4].text
    tiny = StragglerRule(AlertsConfig(patience_records=1))
    assert tiny.see(1, 4, 3.0, 0.001, 1.0) is None  # three times nothing


def test_files_are_read_back_in_order_and_a_second_one_keeps_the_first(tmp_path):
    folder = tmp_path / "alerts"
    assert read_alerts(folder) == []
    for alert in (
        Alert("stall", 12, "no progress", {}, rank=3),
        Alert("loss_spike", 7, "up", {"loss_nats": 9.5}),
        Alert("loss_spike", 7, "up again"),
    ):
        write_alert(folder, alert)
    (folder / "step_00000009_broken.json").write_text("{")
    found = read_alerts(folder)
    assert [(a["step"], a["kind"], a["text"]) for a in found] == [
        (7, "loss_spike", "up"), (7, "loss_spike", "up again"), (12, "stall", "no progress"),
    ]  # fmt: skip
    assert found[2]["file"] == "step_00000012_stall_rank_3.json"
    assert json.loads((folder / "step_00000007_loss_spike.json").read_text())["fields"] == {"loss_nats": 9.5}
