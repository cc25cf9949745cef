"""Makes a checkpoint folder durable and visible in one step, and says which ones can be trusted.

The order of a save, and what a crash between two lines leaves behind:

    checkpoints/step_00000120.partial/ is filled     -> a partial: never read, removed at the next start
    every file and folder in it is fsynced
    COMMITTED.json (sizes and hashes) is written     -> still a partial by its name
    the folder is renamed to step_00000120, fsync    -> committed: a scan finds it without any pointer
    checkpoints/latest -> step_00000120              -> `latest` and `committed_step` are hints, moved last
    RUN/committed_step = 120
    older checkpoints are renamed *.pruned, removed  -> a pruned one is never read, removed at the next start

Nothing here knows torch or megatron: folders, bytes and names only. One process of a run calls it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import CheckpointError

FORMAT_VERSION = 1
MARKER_NAME = "COMMITTED.json"
LATEST_NAME = "latest"
HASHED_UP_TO_BYTES = 1 << 20

_STEP_NAME = re.compile(r"^step_(\d{8,})$")
_LEFTOVER = re.compile(r"^(step_\d{8,}\.(partial|pruned)|\..*\.tmp)$")


class DamagedCheckpointError(CheckpointError):
    """A checkpoint folder without a readable marker, or whose files differ from it."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a committed checkpoint.

    Attributes:
        num_bytes: size when it was committed.
        sha256: hash of the content, for files of up to `HASHED_UP_TO_BYTES`; None for larger ones.
    """

    num_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Marker:
    """The content of COMMITTED.json.

    Attributes:
        step: optimizer steps done when the checkpoint was made.
        files: by path relative to the checkpoint folder, with forward slashes.
        made_with: versions of the software that wrote it.
        about: what else the writer wants to find again (number of processes, hash of the config).
        format_version: layout of the folder; a newer one than ours is refused.
    """

    step: int
    files: dict[str, FileRecord]
    made_with: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def total_bytes(self) -> int:
        """Bytes of all recorded files."""
        return sum(record.num_bytes for record in self.files.values())


@dataclass(frozen=True)
class Scan:
    """What a checkpoints folder holds.

    Attributes:
        newest: newest step that passed verification, or None.
        skipped: (folder name, reason) of checkpoints newer than `newest` that did not.
    """

    newest: int | None
    skipped: tuple[tuple[str, str], ...]


def step_folder_name(step: int) -> str:
    """Name of the folder of a committed checkpoint."""
    return f"step_{step:08d}"


def fsync_path(path: Path) -> None:
    """Ask the kernel to put a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file: readers see the old text or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def _record(path: Path) -> FileRecord:
    num_bytes = path.stat().st_size
    if num_bytes > HASHED_UP_TO_BYTES:
        return FileRecord(num_bytes, None)
    return FileRecord(num_bytes, hashlib.sha256(path.read_bytes()).hexdigest())


def read_marker(folder: Path) -> Marker:
    """The marker of a checkpoint folder.

    Raises:
        DamagedCheckpointError: there is none, or it cannot be read.
        CheckpointError: it was written by a newer format of this framework.
    """
    path = folder / MARKER_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        format_version = int(values["format_version"])
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{folder} has no {MARKER_NAME}: its save never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    if format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {format_version}, this version reads up to {FORMAT_VERSION}; "
            "continue with the version of phsa-megatron that wrote it, or a newer one"
        )
    try:
        files = {name: FileRecord(**record) for name, record in values.pop("files").items()}
        return Marker(files=files, **values)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} has unknown or missing entries: {error}") from error


def verify(folder: Path) -> Marker:
    """The marker of a checkpoint folder, after comparing every file with it.

    Sizes are compared for all files, content for those small enough to carry a hash.

    Raises:
        DamagedCheckpointError: a file is missing or differs.
    """
    marker = read_marker(folder)
    for name, record in marker.files.items():
        path = folder / name
        try:
            num_bytes = path.stat().st_size
        except OSError as error:
            raise DamagedCheckpointError(f"{path} is missing ({error.strerror})") from error
        if num_bytes != record.num_bytes:
            raise DamagedCheckpointError(f"{path} has {num_bytes} bytes, {record.num_bytes} were committed")
        if record.sha256 is not None and _record(path).sha256 != record.sha256:
            raise DamagedCheckpointError(f"{path} has another content than was committed")
    if _STEP_NAME.match(folder.name) and folder.name != step_folder_name(marker.step):
        raise DamagedCheckpointError(f"{folder} holds step {marker.step}: the folder was renamed")
    return marker


def make_empty(folder: Path) -> None:
    """Make a folder, or empty one that an interrupted save left."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def seal(
    partial: Path,
    final: Path,
    step: int,
    made_with: dict[str, str] | None = None,
    about: dict[str, Any] | None = None,
) -> Marker:
    """Turn a filled staging folder into a committed checkpoint folder beside it.

    Args:
        partial: the staging folder; everything in it becomes part of the checkpoint.
        final: its final path, in the same parent. A folder that is there already is moved aside.
        step: optimizer steps done.
        made_with: versions, for the marker.
        about: what else to record.

    Raises:
        OSError: the disk refused; `final` does not hold the new checkpoint then.
    """
    files: dict[str, FileRecord] = {}
    for parent, _, names in os.walk(partial, topdown=False):
        for name in names:
            path = Path(parent, name)
            fsync_path(path)
            files[path.relative_to(partial).as_posix()] = _record(path)
        fsync_path(Path(parent))
    marker = Marker(step, files, made_with or {}, about or {})
    write_atomically(partial / MARKER_NAME, json.dumps(asdict(marker), indent=1, sort_keys=True) + "\n")
    if final.exists():  # a damaged one, that the resume skipped: kept aside for a person to look at
        aside = final.with_name(f"{final.name}.damaged")
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    partial.rename(final)
    fsync_path(final.parent)
    return marker


class CheckpointStore:
    """The checkpoints of one run: stages, commits, finds and prunes them.

    Args:
        checkpoints_dir: RUN/checkpoints; made when the first save begins.
        committed_step_file: RUN/committed_step, the newest committed step as text.
    """

    def __init__(self, checkpoints_dir: Path, committed_step_file: Path) -> None:
        self.checkpoints_dir = Path(checkpoints_dir)
        self.committed_step_file = Path(committed_step_file)

    def path(self, step: int) -> Path:
        """Folder of a committed step."""
        return self.checkpoints_dir / step_folder_name(step)

    def partial_path(self, step: int) -> Path:
        """Folder in which a step is staged."""
        return self.checkpoints_dir / f"{step_folder_name(step)}.partial"

    def is_committed(self, step: int) -> bool:
        """Whether this step is there and verified."""
        try:
            verify(self.path(step))
        except DamagedCheckpointError:
            return False
        return True

    def begin(self, step: int) -> Path:
        """Make an empty staging folder for a step and return it."""
        partial = self.partial_path(step)
        make_empty(partial)
        return partial

    def abandon(self, step: int) -> None:
        """Remove what a failed save left in its staging folder, which also gives its space back."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def commit(
        self, step: int, made_with: dict[str, str] | None = None, about: dict[str, Any] | None = None
    ) -> Marker:
        """Make the staged step durable and visible; on return it survives a power cut.

        Raises:
            OSError: the disk refused (full, quota, gone); the step is still only staged.
        """
        marker = seal(self.partial_path(step), self.path(step), step, made_with, about)
        self._point_to(step)
        return marker

    def _point_to(self, step: int) -> None:
        temporary = self.checkpoints_dir / f".{LATEST_NAME}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(step_folder_name(step))
        temporary.replace(self.checkpoints_dir / LATEST_NAME)
        fsync_path(self.checkpoints_dir)
        write_atomically(self.committed_step_file, f"{step}\n")

    def steps(self) -> list[int]:
        """Steps that have a folder under their final name, ascending; nothing is verified."""
        if not self.checkpoints_dir.is_dir():
            return []
        matches = (_STEP_NAME.match(path.name) for path in self.checkpoints_dir.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def scan(self) -> Scan:
        """The newest checkpoint that passes verification, and the newer ones that do not.

        Names decide nothing but the order: `latest` is not read.

        Raises:
            CheckpointError: one of them was written by a newer format.
        """
        skipped = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except DamagedCheckpointError as error:
                skipped.append((step_folder_name(step), str(error)))
            else:
                return Scan(step, tuple(skipped))
        return Scan(None, tuple(skipped))

    def recorded_step(self) -> int | None:
        """The step in RUN/committed_step; None if nothing was ever committed here."""
        try:
            return int(self.committed_step_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            # Written atomically by us, so a person edited it. It proves that something was committed.
            return -1

    def newest(self) -> Scan:
        """Like `scan`, but refuses to answer "start from zero" where something was once committed.

        Raises:
            CheckpointError: there are checkpoints, or `committed_step` says that there were, and
                none can be trusted.
        """
        found = self.scan()
        recorded = self.recorded_step()
        if found.newest is None and (found.skipped or recorded is not None):
            reasons = [f"  {name}: {reason}" for name, reason in found.skipped]
            if recorded is not None:
                reasons.append(f"  {self.committed_step_file} says that step {recorded} was committed")
            raise CheckpointError(
                f"{self.checkpoints_dir} holds no checkpoint that can be trusted:\n"
                + "\n".join(reasons)
                + "\nStarting again from step 0 here would hide the loss, so it is refused. Restore a "
                "checkpoint folder from a backup, or start a new run under another run.name."
            )
        if found.newest is not None and recorded is not None and recorded > found.newest:
            name = step_folder_name(recorded)
            if name not in dict(found.skipped):
                found = Scan(found.newest, ((name, "it was committed, but is not there"), *found.skipped))
        return found

    def prune(self, keep_last: int) -> list[int]:
        """Remove committed checkpoints older than the newest `keep_last`; returns their steps.

        The newest is never removed, whatever `keep_last` is; folders without a marker are left alone.
        """
        marked = [step for step in self.steps() if (self.path(step) / MARKER_NAME).is_file()]
        old = marked[: -max(1, keep_last)]
        for step in old:
            # Renamed first: a crash while removing must not leave a folder that looks damaged.
            doomed = self.checkpoints_dir / f"{step_folder_name(step)}.pruned"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)
        return old

    def clean_leftovers(self) -> list[str]:
        """Remove what an interrupted save or removal left; returns one line for each.

        Only a run that is about to train may call it: another process might be saving right now.
        """
        if not self.checkpoints_dir.is_dir():
            return []
        lines = []
        for path in sorted(self.checkpoints_dir.iterdir()):
            if not _LEFTOVER.match(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            lines.append(f"removed {path}: left by a save that was interrupted")
        return lines
