"""The decision between starting, resuming and being finished, made once before any process starts.

Only files and names here; what is inside a checkpoint is the business of `phsa_megatron.training`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from phsa_megatron.config import lineage, resolved, resume_rules
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig


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
        message = f"starting from scratch in {folder.path}"
        if config.run.init_from is not None:
            source = lineage.describe_source(config.run.init_from)
            if source.config_file is not None:
                resume_rules.check_new_stage(resolved.load(source.config_file), config)
            message = f"starting a new stage in {folder.path} from the weights of {source}"
        return PreparedRun(folder, Start.scratch, (message,))
    newest = committed[-1]
    changed: tuple[str, ...] = ()
    if folder.config_file.is_file():
        changes = resume_rules.diff(resolved.load(folder.config_file), config)
        changes.require_resumable(str(folder.path))
        if changes.changes:
            changed = ("settings changed since the last start:", changes.table())
    if folder.done.exists() and newest >= config.run.train_steps:
        return PreparedRun(folder, Start.finished, (_finished_message(folder, newest, config),))
    return PreparedRun(folder, Start.resume, (f"resuming {folder.path} from step {newest}", *changed))


def prepare_run_folder(config: TrainConfig) -> PreparedRun:
    """Make a run folder ready: resolved file written, stale requests removed, lineage recorded.

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
        found = f"{folder.checkpoints_dir} holds {', '.join(entries)}, and no committed checkpoint"
    elif folder.committed_step.exists():
        recorded = folder.committed_step.read_text(encoding="utf-8").strip()
        found = f"{folder.committed_step} says that step {recorded} was committed, and no checkpoint is there"
    else:
        return
    raise ConfigError(
        f"{found}. Starting again from step 0 here would hide the loss, so it is refused. Restore "
        f"a checkpoint from a backup, choose another run.name, or move {folder.path} away."
    )


def _finished_message(folder: RunFolder, newest: int, config: TrainConfig) -> str:
    return (
        f"{folder.path} is finished: step {newest} of {config.run.train_steps}. To go on training, set "
        f"run.train_steps to more than {newest}; to train again, choose another run.name."
    )
