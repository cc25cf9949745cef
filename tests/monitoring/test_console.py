import io
import re

import pytest
from rich.console import Console as RichConsole

from phsa_megatron.config.schema import MonitoringConfig, RunConfig, TrainConfig
from phsa_megatron.monitoring.console import Console, format_step, short_count, short_time

VALUES = {
    "train/loss_nats": 5.12347,
    "optim/lr": 1e-3,
    "optim/grad_norm": 0.8765,
    "perf/tokens_per_s": 12_345.0,
    "perf/mfu_selected_frac": 0.4123,
    "progress/eta_s": 3_222.2,
    "optim/num_zeros": 17,
}


def _console(is_terminal, rank=0, progress=True, name="demo[run]"):
    out = io.StringIO()
    terminal = RichConsole(file=out, force_terminal=is_terminal, width=160, highlight=False, soft_wrap=True)
    config = TrainConfig(run=RunConfig(name=name), monitoring=MonitoringConfig(progress=progress))
    return Console(config, 100, rank=rank, terminal=terminal), out


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_line_shows_all_values_a_person_watches():
    assert format_step(7, 1500, VALUES) == (
        "step    7/1500  loss 5.1235  lr 1.00e-03  grad 0.876  12.3k tok/s  mfu 41.2%  eta 0:53:42"
    )


def test_what_is_missing_is_left_out():
    assert format_step(7, 10, {"train/loss_nats": 5.0}) == "step  7/10  loss 5.0000"


def test_without_a_terminal_each_step_is_one_plain_line_and_messages_keep_their_order():
    console, out = _console(is_terminal=False)
    console.start(0)
    console.step(1, VALUES)
    console.message("checkpoint [1] requested")
    console.step(2, {"train/loss_nats": 4.0})
    console.close()
    lines = out.getvalue().splitlines()
    assert [line[:12] for line in lines] == ["step   1/100", "checkpoint [", "step   2/100"]
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_there_is_a_live_bar_and_messages_stand_alone_above_it():
    console, out = _console(is_terminal=True)
    console.start(10)
    console.step(11, VALUES)
    console.message("checkpoint [11] committed")
    console.step(12, VALUES)
    console.close()
    shown = _plain(out.getvalue())
    assert "demo[run]" in shown and "━" in shown and "step  12/100" in shown
    assert "checkpoint [11] committed" in re.split(r"[\r\n]+", shown)


def test_progress_false_gives_plain_lines_on_a_terminal():
    console, out = _console(is_terminal=True, progress=False)
    console.start(0)
    console.step(1, VALUES)
    console.close()
    assert "━" not in out.getvalue() and "step   1/100" in out.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_ranks_are_silent(is_terminal):
    console, out = _console(is_terminal, rank=1)
    console.start(0)
    console.step(1, VALUES)
    console.message("hello")
    console.close()
    assert out.getvalue() == ""


def test_closing_twice_and_going_on_afterwards_prints_plain_lines():
    console, out = _console(is_terminal=True)
    console.start(0)
    console.close()
    console.close()
    out.truncate(0)
    console.step(3, {"train/loss_nats": 4.0})
    assert "step   3/100  loss 4.0000" in _plain(out.getvalue())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1k"),
        (12_345, "12.3k"),
        (4_500_000, "4.5M"),
        (1.2e9, "1.2B"),
        (3.4e12, "3.4T"),
    ],
)
def test_counts_are_short(value, text):
    assert short_count(value) == text


def test_times_are_readable():
    assert short_time(59.6) == "0:01:00"
    assert short_time(90_061) == "1 day, 1:01:01"
