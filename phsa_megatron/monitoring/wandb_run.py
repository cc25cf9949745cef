"""Weights & Biases: one experiment is one run, however often it is started again.

The run id is made once and kept in the run folder. Steps have their own axis, because W&B's internal step
may never go back while a resumed run does. Once started, W&B can neither stop nor fail the training.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from phsa_megatron.config.derive import Derived
from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.schema import TrainConfig, WandbMode
from phsa_megatron.monitoring.metrics import LAUNCH, STEP_AXIS

_LOG = logging.getLogger(__name__)
_RUN_ID_FILE = "run_id"


class WandbRun:
    """A started W&B run that takes values and never raises."""

    def __init__(self, run: Any, sync_command: str | None, launch: int = 1) -> None:
        """Wrap a run.

        Args:
            run: What `wandb.init` returned.
            sync_command: The command that uploads an offline run; None if it uploads by itself.
            launch: Number of this start of the run, from 1.
        """
        self._launch = launch
        self._run = run
        self.sync_command = sync_command
        self._failed = False

    @property
    def run_id(self) -> str:
        """The id that all launches of this run folder share."""
        return str(self._run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send values at a step of the run's own axis; a failure is said once and then W&B is left alone."""
        if self._failed:
            return
        try:
            self._run.log({STEP_AXIS: step, LAUNCH: self._launch, **values})
        except Exception as error:  # Whatever W&B does, training goes on and metrics.jsonl is complete.
            self._give_up("log", error)

    def alert(self, title: str, text: str) -> None:
        """Send an alert, which W&B mails or posts where its settings say; an offline run does when synced."""
        if self._failed:
            return
        try:
            self._run.alert(title=title, text=text, level="WARN")
        except Exception as error:
            self._give_up("alert", error)

    def table(self, step: int, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Send a table, such as samples of text."""
        if self._failed or not rows:
            return
        try:
            wandb = importlib.import_module("wandb")
            table = wandb.Table(columns=columns, data=rows)
            self._run.log({STEP_AXIS: step, LAUNCH: self._launch, name: table})
        except Exception as error:
            self._give_up("table", error)

    def histogram(self, step: int, name: str, shares: list[float], edges: list[float]) -> None:
        """Send a histogram: shares of the bins between edges."""
        if self._failed:
            return
        try:
            wandb = importlib.import_module("wandb")
            histogram = wandb.Histogram(np_histogram=(shares, edges))
            self._run.log({STEP_AXIS: step, LAUNCH: self._launch, name: histogram})
        except Exception as error:
            self._give_up("histogram", error)

    def code(self, text: str, code_dir: Path) -> None:
        """Keep the code of this launch: a line in the configuration, the files under code/launch_N.

        Args:
            text: the code in one line.
            code_dir: RUN/code; the next launch writes it anew, so that its files are copied.
        """
        if self._failed:
            return
        try:
            name = f"launch_{self._launch}"
            copied = shutil.copytree(code_dir, Path(self._run.dir) / "code" / name, dirs_exist_ok=True)
            self._run.save(f"{copied}/*", base_path=self._run.dir, policy="now")
            self._run.config.update({"code": {name: text}}, allow_val_change=True)
        except Exception as error:  # The numbers are worth having without it.
            _LOG.warning(
                "W&B did not take the code (%s: %s); it is in %s.", type(error).__name__, error, code_dir
            )

    def close(self) -> None:
        """Finish the run and print the upload command of an offline one."""
        try:
            self._run.finish()
        except Exception as error:
            self._give_up("finish", error)
        if self.sync_command is not None:
            print(f"W&B was offline; upload this run with: {self.sync_command}")

    def _give_up(self, what: str, error: Exception) -> None:
        self._failed = True
        _LOG.warning(
            "W&B failed in %s (%s: %s) and gets no more values from this launch; metrics.jsonl has them all.",
            what,
            type(error).__name__,
            error,
        )


def start_wandb(config: TrainConfig, derived: Derived, wandb_dir: Path, launch: int = 1) -> WandbRun | None:
    """Start W&B as configured.

    Args:
        config: The resolved configuration, uploaded as it is.
        derived: The derived values, uploaded under `derived`.
        wandb_dir: `RUN/wandb`, where W&B writes and the run id is kept.
        launch: Number of this start of the run, from 1.

    Returns:
        The started run, or None if `monitoring.wandb.mode` is disabled. If the server of an online run does
        not answer, the launch goes on offline with a warning: the same run id is uploaded later.

    Raises:
        DeviceError: wandb is not installed, or mode=online without a login.
    """
    settings = config.monitoring.wandb
    if settings.mode == WandbMode.disabled:
        return None
    wandb = _import_wandb(settings.mode)
    wandb_dir.mkdir(parents=True, exist_ok=True)
    arguments = {
        "project": settings.project,
        "entity": settings.entity,
        "name": config.run.name,
        "id": stable_run_id(wandb_dir),
        "resume": "allow",
        "dir": str(wandb_dir.parent),
        "config": {**dataclasses.asdict(config), "derived": dataclasses.asdict(derived)},
        # The console belongs to our progress bar, and code() keeps more than the script that started.
        "settings": wandb.Settings(console="off", silent=True, save_code=False, init_timeout=60),
    }
    mode = str(settings.mode.value)
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.errors.CommError as error:
        _LOG.warning("W&B's server does not answer (%s): this launch goes on with W&B offline.", error)
        mode = "offline"
        run = wandb.init(mode=mode, **arguments)
    run.define_metric(STEP_AXIS)
    run.define_metric("*", step_metric=STEP_AXIS)
    return WandbRun(run, sync_command(wandb_dir, run.id) if mode == "offline" else None, launch)


def sync_command(wandb_dir: Path, run_id: str) -> str:
    """Return the command that uploads every offline launch of a run folder into its one W&B run."""
    return f"wandb sync --id {run_id} {wandb_dir}/offline-run-*"


def stable_run_id(wandb_dir: Path) -> str:
    """Return the run id kept in `wandb_dir`, made at the first call.

    The file appears complete or not at all, so a kill cannot leave an empty id behind.
    """
    file = wandb_dir / _RUN_ID_FILE
    if not file.exists():
        wandb_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(file, secrets.token_hex(4) + "\n")
    return file.read_text(encoding="ascii").strip()


def _import_wandb(mode: WandbMode) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise DeviceError(
            f"monitoring.wandb.mode={mode.value} needs the package wandb, which cannot be imported "
            f"({error}). Install it with: pip install 'phsa-megatron[train]', or set "
            "monitoring.wandb.mode=disabled."
        ) from error
    if mode == WandbMode.online and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise DeviceError(
            "monitoring.wandb.mode=online needs a login and there is none. Run `wandb login`, set "
            "WANDB_API_KEY, or set monitoring.wandb.mode=offline."
        )
    return wandb
