"""A sweep: the settings with several values are multiplied out, and each combination is a run of its own."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phsa_launch.submit import Submitted, check_with_slurm, refuse_a_second_job, submit_run
from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.errors import ConfigError, PhsaError
from phsa_megatron.config.overrides import GROUPS
from phsa_megatron.config.prepare_run import inspect_run_folder
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Scheduler, TrainConfig
from phsa_megatron.config.validate import validate

MAX_RUNS = 1000
"""More than this is a mistyped range."""


@dataclass(frozen=True)
class SweepRun:
    """One combination.

    Attributes:
        arguments: the command line that starts it alone, without its name.
        swept: the settings that differ between the runs, by key, as typed.
    """

    arguments: tuple[str, ...]
    swept: dict[str, str]


def expand(arguments: list[str], recipes_dir: Path | None = None) -> list[SweepRun]:
    """Return every combination of the arguments that have several values, the last one changing fastest.

    Hydra's own syntax: `a,b`, `choice(a,b)`, `range(1,4)`, and `glob(...)` over the files of a group.

    Raises:
        ConfigError: no argument has several values, or one cannot be read.
    """
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    swept_keys: list[str] = []
    for text in arguments:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"'{text}' cannot be read as KEY=VALUE: {str(error).splitlines()[0]}"
            ) from error
        if override.is_sweep_override():
            choices.append(_values(override, recipes_dir))
            swept_keys.append(override.key_or_group)
        else:
            choices.append([text])
    if not swept_keys:
        raise ConfigError("--multirun: no setting has several values; write one like optim.lr=1e-3,2e-3")
    if "run.name" in swept_keys:
        raise ConfigError("run.name: a sweep names its runs itself, NAME-KEY=VALUE; give one name or none")
    runs = []
    for combination in itertools.islice(itertools.product(*choices), MAX_RUNS + 1):
        swept = dict(text.split("=", 1) for text in combination if text.split("=", 1)[0] in swept_keys)
        runs.append(SweepRun(tuple(combination), swept))
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"--multirun: more than {MAX_RUNS} combinations; sweep fewer values")
    return runs


def start(arguments: list[str], recipes_dir: Path | None, dry_run: bool, test_only: bool) -> int:
    """Check all runs of a sweep, then submit each, and print a table; returns the exit code.

    Nothing is submitted if one of them breaks a rule. The exit code is 1 if Slurm refused one.
    """
    sweep = expand(arguments, recipes_dir)
    configs = [_checked(run, recipes_dir) for run in sweep]
    names = [config.run.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--multirun: two runs would be called {name}; remove a repeated value")
    for config in configs:
        inspect_run_folder(config)
        if not dry_run and not test_only:
            refuse_a_second_job(RunFolder.of(config))
    table = Table("run folder", *sweep[0].swept, "job")
    failed = False
    for run, config in zip(sweep, configs, strict=True):
        try:
            if dry_run:
                outcome = "not submitted"
            elif test_only:
                outcome = check_with_slurm(config)
            else:
                outcome = _outcome(submit_run(config))
        except PhsaError as error:
            failed, outcome = True, f"refused: {error}"
        cells = (str(RunFolder.of(config).path), *run.swept.values(), outcome)
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    Console().print(table)
    return int(failed)


def _values(override: Override, recipes_dir: Path | None) -> list[str]:
    """Return `key=value` for every value of one argument."""
    key = override.key_or_group
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        if key not in GROUPS:
            raise ConfigError(f"{key}: glob() chooses among the files of a group ({', '.join(GROUPS)})")
        glob = override.value()
        assert isinstance(glob, Glob)
        values = glob.filter(options(recipes_dir)[key])
        if not values:
            raise ConfigError(f"{override.input_line}: no file of recipes/{key} matches")
    elif override.is_interval_sweep():
        raise ConfigError(f"{override.input_line}: an interval has no end of values; use range(FROM,TO,STEP)")
    else:
        values = list(override.sweep_string_iterator())
    return [f"{key}={value}" for value in values]


def _checked(run: SweepRun, recipes_dir: Path | None) -> TrainConfig:
    """Compose and check one run, whose name tells it from the others."""
    try:
        config = compose(list(run.arguments), recipes_dir).config
        config.run.name += "".join(
            f"-{key.rsplit('.', 1)[-1]}_{re.sub('[^A-Za-z0-9._-]+', '_', value).strip('_')}"
            for key, value in run.swept.items()
        )
        validate(config)
    except ConfigError as error:
        what = " ".join(f"{key}={value}" for key, value in run.swept.items())
        raise ConfigError(f"the run with {what}:\n{error}") from error
    if config.cluster.scheduler is Scheduler.local:
        raise ConfigError(
            f"--multirun submits jobs, and cluster.scheduler of cluster={config.cluster.name} is local; "
            "choose a Slurm cluster, or start the runs one after the other"
        )
    return config


def _outcome(submitted: Submitted) -> str:
    return ", ".join(submitted.job_ids) or "finished already"
