"""What a person sees while a run trains: a progress bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from phsa_megatron.config.schema import TrainConfig


class Console:
    """Shows step, loss, learning rate, gradient norm, speed, utilization and time left; only rank 0 prints.

    On a terminal the values stand in one live line and messages scroll above it. In a log file each
    step is a line.
    """

    def __init__(
        self, config: TrainConfig, total_steps: int, *, rank: int, terminal: RichConsole | None = None
    ) -> None:
        """Choose between the live line and plain lines.

        Args:
            config: `monitoring.progress=false` gives plain lines on a terminal too; `run.name` labels it.
            total_steps: Optimizer steps of the whole run.
            rank: Global rank of this process; any rank but 0 prints nothing.
            terminal: Where to print; None is standard output.
        """
        self._terminal = terminal or RichConsole(highlight=False, soft_wrap=True)
        self._name = config.run.name
        self._total_steps = total_steps
        self._silent = rank != 0
        self._live = config.monitoring.progress and self._terminal.is_terminal and not self._silent
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, first_step: int) -> None:
        """Show the bar; `first_step` is the number of steps already done, 0 in a new run."""
        if not self._live or self._progress is not None:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            _ValuesColumn(),
            console=self._terminal,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(
            escape(self._name), total=self._total_steps, completed=first_step, line=""
        )
        self._progress.start()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a step.

        Args:
            step: Optimizer steps done.
            values: Metrics by name; what is missing is left out of the line.
        """
        if self._silent:
            return
        line = format_step(step, self._total_steps, values)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, line=line)
        else:
            self._terminal.print(line, markup=False)

    def message(self, text: str) -> None:
        """Print a line or several; above the bar if there is one."""
        if not self._silent:
            self._terminal.print(text, markup=False)

    def close(self) -> None:
        """Leave the bar as it last was and give the terminal back; calling it again does nothing."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _ValuesColumn(ProgressColumn):
    """The step's line, behind the bar."""

    def render(self, task: Task) -> Text:
        """Return the last line that was handed over."""
        return Text(task.fields["line"], overflow="ellipsis", no_wrap=True)


def format_step(step: int, total_steps: int, values: dict[str, float]) -> str:
    """Return one readable line for a step.

    Args:
        step: Optimizer steps done.
        total_steps: Steps of the whole run.
        values: Metrics by name.

    Returns:
        For example `step  120/1500  loss 5.1234  lr 1.00e-03  grad 0.87  12.3k tok/s  eta 0:03:10`.
    """
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    formats: dict[str, Callable[[float], str]] = {
        "train/loss_nats": lambda value: f"loss {value:.4f}",
        "val/loss_nats": lambda value: f"val {value:.4f}",
        "optim/lr": lambda value: f"lr {value:.2e}",
        "optim/grad_norm": lambda value: f"grad {value:.3g}",
        "perf/tokens_per_s": lambda value: f"{short_count(value)} tok/s",
        "perf/mfu_selected_frac": lambda value: f"mfu {value:.1%}",
        "progress/eta_s": lambda value: f"eta {short_time(value)}",
    }
    parts += [render(values[name]) for name, render in formats.items() if name in values]
    return "  ".join(parts)


def short_count(value: float) -> str:
    """Return a count in at most five characters: 950, 12.3k, 4.5M, 1.2B, 3.4T."""
    for threshold, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= threshold * 0.9995:
            return f"{value / threshold:.3g}{suffix}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """Return a duration as h:mm:ss, with days in front if there are any."""
    return str(timedelta(seconds=round(seconds)))
