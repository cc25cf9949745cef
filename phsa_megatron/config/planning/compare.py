"""The plan's prediction beside measured runs: peak memory and time of a step.

Nothing in the plan is fitted to these rows. A file holds a list of rows like

    {"recipe": "phsa_0p6b_pretrain_8gpu_h100_bf16_4k", "overrides": ["cluster=local_gpu"], "device": "...",
     "step_time_s": 1.23, "peak_memory_gib": 45.6}

`step_time_s` is the median time of a step and `peak_memory_gib` the largest of any process, as the metrics
`perf/step_time_s` and `memory/peak_gib` report them.

The plan takes every sequence to be one document. PHSA's time hardly depends on that, so its rows are compared
whatever they pack. Dense attention's is the sum of the squares of documents' lengths: a row of packed
documents says `document_tokens`, that sum over the sum of the lengths. Of one that does not, only the memory
is compared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator
from phsa_megatron.config.schema import AttentionKind, TrainConfig

TOLERANCE_FRAC = 0.15
"""How far a prediction may be from its row."""
_COLUMNS = ("recipe", "overrides", "device", "step_time_s", "peak_memory_gib")


@dataclass(frozen=True)
class Comparison:
    """One measured run and its prediction.

    Attributes:
        name: recipe and overrides.
        predicted_step_s: by the step-time model.
        measured_step_s: of the row.
        predicted_gib: by the memory model, without the reserve.
        measured_gib: of the row.
        time_modelled: False where the row does not say what the time depends on.
    """

    name: str
    predicted_step_s: float
    measured_step_s: float
    predicted_gib: float
    measured_gib: float
    time_modelled: bool = True

    @property
    def step_error_frac(self) -> float:
        """Return the distance of the predicted time; positive is too slow a prediction."""
        return self.predicted_step_s / self.measured_step_s - 1

    @property
    def memory_error_frac(self) -> float:
        """Return the distance of the predicted memory; positive is too much predicted."""
        return self.predicted_gib / self.measured_gib - 1

    @property
    def within(self) -> bool:
        """Return whether both are within the tolerance; a time that is not modelled does not count."""
        errors = [self.memory_error_frac, self.step_error_frac if self.time_modelled else 0.0]
        return max(map(abs, errors)) <= TOLERANCE_FRAC

    def cells(self) -> tuple[str, ...]:
        """Return predicted and measured seconds and the error, then the same of GiB, as texts."""
        return (
            f"{self.predicted_step_s:.3f}" if self.time_modelled else "-",
            f"{self.measured_step_s:.3f}",
            f"{self.step_error_frac:+.1%}" if self.time_modelled else "not modelled",
            f"{self.predicted_gib:.1f}",
            f"{self.measured_gib:.1f}",
            f"{self.memory_error_frac:+.1%}",
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, without those that say why there is no measurement (`failed`).

    Raises:
        ConfigError: the file is missing, or a row lacks a column.
    """
    if not path.is_file():
        raise ConfigError(f"--compare {path}: no such file")
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in rows if "failed" not in row]
    for row in rows:
        missing = [column for column in _COLUMNS if column not in row]
        if missing:
            raise ConfigError(f"{path}: a row lacks {', '.join(missing)}; a row has {', '.join(_COLUMNS)}")
    return rows


def compare(row: dict[str, Any]) -> Comparison:
    """Return a row's measured values with the plan's prediction for the same settings."""
    arguments = [f"recipe={row['recipe']}", *row["overrides"]]
    config = run_to_plan(arguments)
    lengths = row.get("document_tokens") if config.data.isolate_documents else None
    estimate = Estimator(config, Machine.of(config)).estimate(config, lengths)
    return Comparison(
        name=" ".join([row["recipe"], *row["overrides"]]),
        predicted_step_s=estimate.time.step_s,
        measured_step_s=row["step_time_s"],
        predicted_gib=estimate.memory.total_gib,
        measured_gib=row["peak_memory_gib"],
        time_modelled=lengths is not None or not _packs_dense(config),
    )


def _packs_dense(config: TrainConfig) -> bool:
    return config.attention.kind == AttentionKind.dense and config.data.isolate_documents


def comparison_table(comparisons: list[Comparison]) -> Table:
    """Return predictions and measurements side by side."""
    table = Table(title=f"prediction and measurement, tolerance {TOLERANCE_FRAC:.0%}", title_justify="left")
    table.add_column("run", overflow="fold")
    for name in ("s/step", "measured", "off by", "GiB", "measured", "off by"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        table.add_row(one.name, *one.cells())
    return table
