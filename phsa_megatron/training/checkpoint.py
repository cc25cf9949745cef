"""Saves and loads the whole of a training run: weights, optimizer, schedule, counters, random generators.

A checkpoint folder RUN/checkpoints/step_00000120/ holds `shards/` (megatron's files), `train_state.json`,
`config.yaml` (the resolved configuration it was made under), `rng/rank_00000.pt` for each process, and
`COMMITTED.json`. How it becomes durable is `commit.py`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from phsa_megatron.config import compose, resume_rules
from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.model import selector_weights
from phsa_megatron.parallel import mcore_checkpointing as shards
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import agreement
from phsa_megatron.training import checkpoint_files as files
from phsa_megatron.training.commit import CheckpointStore, Marker, read_marker, seal, verify
from phsa_megatron.training.local_copy import LocalCopies
from phsa_megatron.training.state import TrainState, check_data_order

if TYPE_CHECKING:
    from phsa_megatron.training.optimizer import Parts

# One failed save is survivable, two in a row mean that a person has to look.
MAX_FAILURES_IN_A_ROW = 2
# Beside the shards: markers, metadata, and what other programs write meanwhile.
SPARE_BYTES = 16 << 20

_logger = logging.getLogger(__name__)


class Notify(Protocol):
    """Receives what happens to checkpoints, on process 0."""

    def __call__(self, kind: str, text: str, **fields: Any) -> None:
        """Take one event.

        Args:
            kind: a stable name (checkpoint_requested, checkpoint_committed, checkpoint_failed,
                checkpoint_skipped, checkpoint_cleaned, checkpoint_pruned, resume).
            text: a line for people.
            fields: numbers and names for records.
        """


def _log(kind: str, text: str, **fields: Any) -> None:
    _logger.log(logging.WARNING if kind.endswith(("failed", "skipped")) else logging.INFO, text)


@dataclass(frozen=True)
class _Found:
    """What process 0 found to resume from, for all processes."""

    step: int | None
    notes: tuple[tuple[str, str], ...]  # (kind, text)


@dataclass(frozen=True)
class _Pending:
    """A save that was requested and is not committed."""

    step: int
    partial: Path
    num_bytes: int
    about: dict[str, Any]
    started_s: float


class Checkpointer:
    """The checkpoints of one run. All processes call the same methods at the same step.

    A failed save never harms training: what is in memory is untouched, the previous committed checkpoint
    stays, the space is given back, and `checkpoint_failed` says why. The run goes on, because stopping would
    lose for certain what the next save may still keep. After `MAX_FAILURES_IN_A_ROW`, or when the caller says
    that the save must succeed, it raises CheckpointError instead.

    Args:
        folder: names in the run folder.
        config: resolved configuration.
        groups: process groups.
        notify: receives events on process 0; the default writes to the log.
    """

    def __init__(
        self, folder: RunFolder, config: TrainConfig, groups: Groups, notify: Notify | None = None
    ) -> None:
        self._config = config
        self._groups = groups
        self._store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
        self._writer = shards.ShardWriter(groups)
        self._notify = _log if notify is None else notify
        self._pending: _Pending | None = None
        self._num_failures = 0
        self._local = LocalCopies(folder.path, config, groups, self._notify)

    def save(self, parts: Parts, state: TrainState, *, must_succeed: bool = False) -> bool:
        """Save now, or with `checkpoint.async_save` begin to.

        Args:
            parts: model, optimizer and schedule.
            state: counters at this step.
            must_succeed: stay until it is committed and raise if it cannot be; for the last save of a
                process.

        Returns:
            Whether the step is committed or on its way.

        Raises:
            CheckpointError: it failed and has to be taken seriously (see the class).
        """
        self.wait()
        if agreement.decide(self._groups, lambda: self._store.is_committed(state.step)):
            return True
        self._tell("checkpoint_requested", f"checkpoint of step {state.step} requested", step=state.step)
        with parts.gathered_parameters():
            weights = self._sharded(parts, loading=False)
            pending, failure = self._stage(weights, state)
            in_background = self._config.checkpoint.async_save
            if failure is None:
                write = self._writer.start if in_background else self._writer.write
                failure = write(weights, pending.partial / files.SHARDS_NAME)
        if failure is not None or not in_background:
            return self._complete(pending, failure, must_succeed)
        self._pending = pending
        if must_succeed:
            self.wait(must_succeed=True)
        return True

    def poll(self) -> None:
        """Commit a save in the background whose writers are done; costs one small all-reduce while one runs.

        Raises:
            CheckpointError: too many saves failed in a row.
        """
        self._finish(wait=False, must_succeed=False)

    def wait(self, *, must_succeed: bool = False) -> None:
        """Stay until no save is under way.

        Raises:
            CheckpointError: too many saves failed in a row, or this one had to succeed.
        """
        self._finish(wait=True, must_succeed=must_succeed)

    def latest_committed(self) -> int | None:
        """The newest step that passes verification, or None; the same answer on all processes."""
        return agreement.decide(self._groups, lambda: self._store.scan().newest)

    def load_latest(
        self, parts: Parts, data_fingerprint: Mapping[str, Any] | None = None
    ) -> TrainState | None:
        """Continue from the newest committed checkpoint.

        Also removes what interrupted saves left behind, so only a run that trains may call it.

        Args:
            parts: filled in place.
            data_fingerprint: what makes up the data order of this run (`SequenceOrder.ingredients`), to be
                compared with `TrainState.data_fingerprint`; None compares nothing.

        Returns:
            The counters, or None where nothing was ever committed.

        Raises:
            CheckpointError: nothing can be trusted, the data order is another one, or it cannot be read.
            ConfigError: a setting changed that may not change on resume.
        """
        found = agreement.decide(self._groups, self._find)
        for kind, text in found.notes:
            self._tell(kind, text)
        if found.step is None:
            return None
        folder = self._store.path(found.step)
        saved = files.read_state(folder)
        if data_fingerprint is not None:
            check_data_order(saved, data_fingerprint)
        state = self.load_from(folder, parts, copy=self._local.choose(folder))
        self._tell("resume", f"resumed from {folder} at step {state.step}", step=state.step)
        return state

    def save_to(self, folder: Path, parts: Parts, state: TrainState) -> None:
        """Write a checkpoint of its own, outside of the run's sequence: nothing is pointed at it or pruned.

        Raises:
            CheckpointError: it could not be written.
        """
        self.wait()  # the caller may be about to end the run: what is under way would be lost
        partial = folder.with_name(f"{folder.name}.partial")
        about = files.about(self._config, self._groups)
        with parts.gathered_parameters():
            weights = self._sharded(parts, loading=False)
            failure = files.write(partial, state, self._config, self._groups)
            failure = failure or self._writer.write(weights, partial / files.SHARDS_NAME)
        if failure is None:
            failure = agreement.attempt(
                self._groups, lambda: seal(partial, folder, state.step, shards.written_by(), about)
            )
        if failure is not None:
            raise CheckpointError(f"{folder} could not be written: {failure}")

    def load_from(
        self,
        folder: Path,
        parts: Parts,
        *,
        weights_only: bool = False,
        fresh_selector: bool = False,
        copy: Path | None = None,
    ) -> TrainState:
        """Fill model, and unless `weights_only` optimizer, schedule and random generators, from a folder.

        Args:
            folder: a committed checkpoint.
            parts: filled in place.
            weights_only: only the model's weights; the optimizer's fp32 copies follow them.
            fresh_selector: with `weights_only`, leave a selector's own weights as they are.
            copy: a copy of the folder to read the shards from.

        Returns:
            The counters that the checkpoint holds.

        Raises:
            CheckpointError: the folder is damaged, of a newer version, or of another model.
        """
        marker = agreement.decide(self._groups, lambda: self._readable(folder))
        if not weights_only:
            self._check_optimizer_layout(marker, folder)
        weights = self._sharded(parts, loading=True, weights_only=weights_only)
        weights = selector_weights.leave_out(weights) if fresh_selector else weights
        loaded = shards.read(weights, (copy or folder) / files.SHARDS_NAME)
        with torch.no_grad():
            for name, module in zip(shards.chunk_names(parts.modules), parts.modules, strict=True):
                selector_weights.fill(module, loaded[name], fresh=fresh_selector)
            if weights_only:
                parts.optimizer.reload_model_params()
            else:
                shards.load_optimizer(parts.optimizer, loaded["optimizer"])
                parts.scheduler.num_steps = 0  # megatron adds what it loads to what was counted before
                parts.scheduler.load_state_dict(loaded["scheduler"])
        if not weights_only:
            note = files.restore_rng(folder, marker, self._config, self._groups)
            if note is not None:
                self._tell("resume", note)
        return files.read_state(folder)

    # Saving.

    def _sharded(self, parts: Parts, *, loading: bool, weights_only: bool = False) -> dict[str, Any]:
        content: dict[str, Any] = dict(shards.model_state(parts.modules, self._groups))
        if not weights_only:
            content["optimizer"] = shards.optimizer_state(
                parts.optimizer, dict(content), self._groups, loading=loading
            )
            content["scheduler"] = parts.scheduler.state_dict()
        return content

    def _stage(self, weights: dict[str, Any], state: TrainState) -> tuple[_Pending, str | None]:
        """Check the space, make the staging folder and write everything but the shards into it."""
        num_bytes = self._total_bytes(weights)
        partial = self._store.partial_path(state.step)
        pending = _Pending(
            state.step, partial, num_bytes, files.about(self._config, self._groups), time.monotonic()
        )
        failure = agreement.attempt(self._groups, lambda: self._check_space(num_bytes)) or files.write(
            partial, state, self._config, self._groups
        )
        return pending, failure

    def _total_bytes(self, weights: dict[str, Any]) -> int:
        mine = torch.tensor(shards.local_num_bytes(weights), dtype=torch.int64, device=self._groups.device)
        return int(self._groups.sum_over_world(mine).item())

    def _check_space(self, num_bytes: int) -> None:
        self._store.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self._store.checkpoints_dir)
        if free < num_bytes + SPARE_BYTES:
            raise OSError(f"no space: it needs {num_bytes + SPARE_BYTES} bytes, {free} are free")

    def _finish(self, *, wait: bool, must_succeed: bool) -> None:
        if self._pending is None:
            return
        done, failure = self._writer.finish(wait=wait)
        if done:
            pending, self._pending = self._pending, None
            self._complete(pending, failure, must_succeed)

    def _complete(self, pending: _Pending, failure: str | None, must_succeed: bool) -> bool:
        """Commit what was written, or account for the failure; returns whether it is committed."""
        if failure is None:
            failure = agreement.attempt(
                self._groups, lambda: self._store.commit(pending.step, shards.written_by(), pending.about)
            )
        if failure is not None:
            self._fail(pending, failure, must_succeed)
            return False
        self._num_failures = 0
        seconds = time.monotonic() - pending.started_s
        self._tell(
            "checkpoint_committed",
            f"checkpoint of step {pending.step} committed: {pending.num_bytes / 2**20:.1f} MiB "
            f"in {seconds:.1f} s, {self._store.path(pending.step)}",
            step=pending.step,
            num_bytes=pending.num_bytes,
            seconds=seconds,
        )
        if self._groups.rank == 0:
            self._prune()
        self._local.take(self._store.path(pending.step))
        return True

    def _prune(self) -> None:
        try:
            removed = self._store.prune(self._config.checkpoint.keep_last)
        except OSError as error:
            # The new checkpoint is safe: an old one too many is no reason to call the save failed.
            self._tell("checkpoint_failed", f"an old checkpoint could not be removed: {error}")
            return
        if removed:
            self._tell("checkpoint_pruned", f"removed checkpoints of steps {removed}", steps=removed)

    def _fail(self, pending: _Pending, failure: str, must_succeed: bool) -> None:
        self._num_failures += 1

        def clean_and_look() -> tuple[int | None, int]:
            self._store.abandon(pending.step)
            return self._store.scan().newest, _free_bytes(self._store.checkpoints_dir)

        newest, free = agreement.decide(self._groups, clean_and_look)
        intact = (
            f"the checkpoint of step {newest} is intact" if newest is not None else "there is no earlier one"
        )
        text = (
            f"checkpoint of step {pending.step} could not be saved to {pending.partial}: {failure}; it needs "
            f"about {pending.num_bytes} bytes, {free} are free there now; {intact}"
        )
        self._tell("checkpoint_failed", text, step=pending.step)
        if must_succeed or self._num_failures >= MAX_FAILURES_IN_A_ROW:
            raise CheckpointError(
                f"{text}. {self._num_failures} save(s) failed in a row, so the run stops. Make room or "
                "repair the disk and start the same command again: it resumes from the newest committed step."
            )

    # Loading.

    def _find(self) -> _Found:
        notes = [("checkpoint_cleaned", line) for line in self._store.clean_leftovers()]
        found = self._store.newest()
        notes += [("checkpoint_skipped", f"skipped {name}: {reason}") for name, reason in found.skipped]
        if found.newest is not None:
            folder = self._store.path(found.newest)
            old = compose.load(folder / files.CONFIG_NAME)
            changes = resume_rules.diff(old, self._config)
            changes.require_resumable(str(folder))
            notes += [("resume", f"changed since the checkpoint: {change}") for change in changes.changes]
        return _Found(found.newest, tuple(notes))

    def _readable(self, folder: Path) -> Marker:
        shards.check_readable(read_marker(folder).made_with, folder)
        return verify(folder)

    def _check_optimizer_layout(self, marker: Marker, folder: Path) -> None:
        if marker.about.get(files.WEIGHTS_ONLY):
            raise CheckpointError(
                f"{folder} holds weights and no optimizer: start another run from it with run.init_from"
            )
        ours = self._config.parallel.distributed_optimizer
        theirs = marker.about.get("distributed_optimizer", ours)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} was saved with parallel.distributed_optimizer={theirs}, this run has {ours}: the "
                f"optimizer state is laid out differently. Set it to {theirs} to continue, or start a new "
                "stage from its weights with run.init_from."
            )

    def _tell(self, kind: str, text: str, **fields: Any) -> None:
        if self._groups.rank == 0:
            self._notify(kind, text, **fields)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free
