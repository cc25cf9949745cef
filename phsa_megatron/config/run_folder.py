"""The run folder: its names, and the decision between starting, resuming and being finished.

Only files and names here; what is inside a checkpoint is the business of `phsa_megatron.training`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from phsa_megatron.config import lineage, resolved, resume_rules
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig

_STEP_FOLDER = re.compile(r"step_(\d+)")
# A save that was interrupted before its commit, or a removal that was: never a checkpoint.
_LEFTOVER = re.compile(r"step_\d+\.(partial|pruned)|\..*\.tmp")


class RunFolder:
    """Names in `RUN/`; nobody else spells them.

    Args:
        path: the folder, whether or not it exists.
    """

    COMMIT_MARKER = "COMMITTED.json"
    """File that makes `checkpoints/step_########` a committed checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.save_request = self.path / "save"
        self.exit_request = self.path / "exit"
        self.done = self.path / "done"
        self.committed_step = self.path / "committed_step"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.report_file = self.path / "report.html"
        self.lineage_file = self.path / "lineage.json"
        self.checkpoints_dir = self.path / "checkpoints"
        self.logs_dir = self.path / "logs"
        self.wandb_dir = self.path / "wandb"
        self.replay_dir = self.path / "replay"

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        """Return the folder of a run: `root_dir/name`, always the same."""
        return cls(Path(config.run.root_dir) / config.run.name)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def committed_steps(self) -> list[int]:
        """Return the steps of the checkpoints that carry a commit marker, ascending; contents are not verified."""
        if not self.checkpoints_dir.is_dir():
            return []
        found = ((entry, _STEP_FOLDER.fullmatch(entry.name)) for entry in self.checkpoints_dir.iterdir())
        return sorted(int(m.group(1)) for entry, m in found if m and (entry / self.COMMIT_MARKER).is_file())

    def unexplained_entries(self) -> list[str]:
        """Return what lies in `checkpoints/` and is neither committed nor a leftover of an interrupted save."""
        if not self.checkpoints_dir.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.checkpoints_dir.iterdir()
            if not _LEFTOVER.fullmatch(entry.name) and not (entry / self.COMMIT_MARKER).is_file()
        )


class Start(StrEnum):
    """How a command goes on in a run folder."""

    scratch = "scratch"
    resume = "resume"
    finished = "finished"


@dataclass(frozen=True)
class PreparedRun:
    """What `prepare_run_folder` found and did.

    Attributes:
        folder: the run folder.
        start: from scratch, from a committed checkpoint, or not at all because the run is finished.
        messages: lines for the person who started the run.
    """

    folder: RunFolder
    start: Start
    messages: tuple[str, ...]


def inspect_run_folder(config: TrainConfig) -> PreparedRun:
    """Decide how a run would start, and change nothing.

    Raises:
        ConfigError: the folder holds checkpoints that cannot be resumed from by this configuration.
    """
    folder = RunFolder.of(config)
    committed = folder.committed_steps()
    if not committed:
        _refuse_to_hide_a_loss(folder)
        messages = (f"starting from scratch in {folder.path}",)
        if config.run.init_from is not None:
            source = lineage.describe_source(config.run.init_from)
            if source.config_file is not None:
                resume_rules.check_new_stage(resolved.load(source.config_file), config)
            messages = (f"starting a new stage in {folder.path} from the weights of {source}",)
        return PreparedRun(folder, Start.scratch, messages)
    newest, messages = committed[-1], ()
    if folder.config_file.is_file():
        changes = resume_rules.diff(resolved.load(folder.config_file), config)
        changes.require_resumable(str(folder.path))
        if changes.changes:
            messages = ("settings changed since the last start:", changes.table())
    if folder.done.exists() and newest >= config.run.train_steps:
        return PreparedRun(folder, Start.finished, (_finished_message(folder, newest, config),))
    return PreparedRun(folder, Start.resume, (f"resuming {folder.path} from step {newest}", *messages))


def prepare_run_folder(config: TrainConfig) -> PreparedRun:
    """Make a run folder ready: the resolved file is written, stale requests are gone, the lineage is recorded.

    A finished run is left untouched. Call it once a run, in one process, before any trainer starts.

    Raises:
        ConfigError: as `inspect_run_folder`, or the folder cannot be written.
    """
    prepared = inspect_run_folder(config)
    folder, messages = prepared.folder, list(prepared.messages)
    if prepared.start == Start.finished:
        return prepared
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        for request in (folder.save_request, folder.exit_request):
            if request.exists():
                request.unlink()
                messages.append(f"removed an old request: {request}")
        folder.done.unlink(missing_ok=True)
        if prepared.start == Start.scratch and config.run.init_from is not None:
            source = lineage.describe_source(config.run.init_from)
            lineage.write_lineage(folder.lineage_file, source)
        resolved.write_atomically(folder.config_file, resolved.dump(config))
    except OSError as error:
        raise ConfigError(
            f"run.root_dir={config.run.root_dir}: {folder.path} cannot be written ({error.strerror}); set "
            "run.root_dir to a folder you may write to"
        ) from error
    return PreparedRun(folder, prepared.start, tuple(messages))


def _refuse_to_hide_a_loss(folder: RunFolder) -> None:
    entries = folder.unexplained_entries()
    if entries:
        found = f"{folder.checkpoints_dir} holds {', '.join(entries)}, and none of it is a committed checkpoint"
    elif folder.committed_step.exists():
        recorded = folder.committed_step.read_text(encoding="utf-8").strip()
        found = f"{folder.committed_step} says that step {recorded} was committed, and no checkpoint is there"
    else:
        return
    raise ConfigError(
        f"{found}. Starting again from step 0 here would hide the loss, so it is refused. Restore a checkpoint "
        f"from a backup, choose another run.name, or move {folder.path} away if it is not needed."
    )


def _finished_message(folder: RunFolder, newest: int, config: TrainConfig) -> str:
    return (
        f"{folder.path} is finished: step {newest} of {config.run.train_steps}. To go on training, set "
        f"run.train_steps to more than {newest}; to train again, choose another run.name."
    )
