"""A copy of the newest committed checkpoint on each node's own disk, for a restart that reads less from afar.

One process a node copies, in a thread, after a commit; training does not wait for it. At a restart a node
reads its copy only if the copy's COMMITTED.json is the shared checkpoint's, byte for byte, and every file has
the checksum that it was copied with. Anything else is ignored with a message: the shared one is the truth.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import agreement
from phsa_megatron.training.commit import MARKER_NAME, make_empty, write_atomically

CHECKSUMS_NAME = "COPIED.json"
_CHUNK_BYTES = 16 << 20
_NUM_READERS = 8
_SPARE_BYTES = 64 << 20

_copying: list[threading.Thread] = []


def wait_for_copies(timeout_s: float) -> None:
    """Wait for copies under way; for the end of a process that leaves in good order."""
    give_up_at_s = time.monotonic() + timeout_s
    for thread in _copying:
        thread.join(max(0.0, give_up_at_s - time.monotonic()))


class LocalCopies:
    """The local copies of one run on this node; does nothing unless `checkpoint.local_copy_dir` is set.

    Args:
        run: the run folder.
        config: the run's settings.
        groups: process groups.
        tell: takes lines for people, on process 0.

    Raises:
        CheckpointError: the folder cannot be written on some node; on all processes.
    """

    def __init__(self, run: Path, config: TrainConfig, groups: Groups, tell: Any) -> None:
        self._groups, self._tell = groups, tell
        per_node = config.cluster.processes_per_node
        self._node, self._num_nodes = groups.rank // per_node, config.cluster.num_nodes
        self._copies = groups.rank % per_node == 0
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        root = config.checkpoint.local_copy_dir
        if root is None:
            return
        # The same name under another root is another run.
        identity = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
        self._folder = Path(root) / f"{config.run.name}_{identity}"
        failure = agreement.attempt_everywhere(groups, self._prepare)
        if failure is not None:
            raise CheckpointError(
                f"checkpoint.local_copy_dir={root}: every node must be able to write there, and one cannot: "
                f"{failure}; choose a folder on the nodes' own disks, or null for no copy"
            )

    def _prepare(self) -> None:
        if self._copies and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / "writable", "")
            for leftover in self._folder.glob("*.partial"):
                shutil.rmtree(leftover)

    def take(self, checkpoint: Path) -> None:
        """Begin to copy a committed checkpoint; one copy at a time, so that a slow disk skips some."""
        if self._folder is None or not self._copies or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(
            target=self._copy, args=(checkpoint, self._folder), name="local copy", daemon=True
        )
        _copying[:] = [thread for thread in _copying if thread.is_alive()] + [self._thread]
        self._thread.start()

    def choose(self, checkpoint: Path) -> Path:
        """The folder that this process reads a committed checkpoint from: its node's copy, or the shared one.

        All processes call it.
        """
        if self._folder is None:
            return checkpoint
        usable = torch.zeros(self._num_nodes, dtype=torch.int64, device=self._groups.device)
        local = self._folder / checkpoint.name
        if self._copies:
            problem = self._problem(checkpoint, local)
            if problem is None:
                usable[self._node] = 1
            else:
                self._say(f"node {self._node} reads the shared checkpoint: {problem}")
        usable = self._groups.sum_over_world(usable)
        if self._groups.rank == 0:
            count = int(usable.sum().item())
            self._tell(
                "local_copy", f"{count} of {self._num_nodes} nodes read their local copy of {checkpoint.name}"
            )
        return local if bool(usable[self._node].item()) else checkpoint

    def _problem(self, checkpoint: Path, local: Path) -> str | None:
        """Why the copy cannot be used, or None."""
        if not local.is_dir():
            return f"there is no copy at {local}"
        try:
            if (local / MARKER_NAME).read_bytes() != (checkpoint / MARKER_NAME).read_bytes():
                return f"{local} is a copy of another checkpoint: its {MARKER_NAME} differs"
            sums: dict[str, int] = json.loads((local / CHECKSUMS_NAME).read_text(encoding="utf-8"))
            wanted = set(json.loads((local / MARKER_NAME).read_text(encoding="utf-8"))["files"])
            if set(sums) != wanted:
                return f"{local} is damaged: it lists other files than its {MARKER_NAME}"
            with ThreadPoolExecutor(_NUM_READERS) as pool:
                found = dict(zip(sums, pool.map(lambda name: _checksum(local / name), sums), strict=True))
        except (OSError, ValueError, KeyError) as error:
            return f"{local} cannot be read: {error}"
        wrong = sorted(name for name in sums if found[name] != sums[name])
        return f"{local} is damaged: {', '.join(wrong[:4])} differs from what was copied" if wrong else None

    def _copy(self, checkpoint: Path, folder: Path) -> None:
        partial = folder / f"{checkpoint.name}.partial"
        try:
            names = list(json.loads((checkpoint / MARKER_NAME).read_text(encoding="utf-8"))["files"])
            needed = sum((checkpoint / name).stat().st_size for name in names) + _SPARE_BYTES
            free = shutil.disk_usage(folder).free
            if free < needed:
                self._say(
                    f"no local copy of {checkpoint.name}: it needs {needed} bytes, {folder} has {free} free"
                )
                return
            make_empty(partial)
            sums = {name: _copy_file(checkpoint / name, partial / name) for name in names}
            write_atomically(partial / CHECKSUMS_NAME, json.dumps(sums) + "\n")
            shutil.copyfile(checkpoint / MARKER_NAME, partial / MARKER_NAME)
            final = folder / checkpoint.name
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in folder.glob("step_*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
        except (OSError, ValueError, KeyError) as error:
            # The checkpoint may have been pruned meanwhile, or the disk is full: the next commit tries again.
            self._say(f"no local copy of {checkpoint.name}: {error}")
            shutil.rmtree(partial, ignore_errors=True)

    def _say(self, text: str) -> None:
        print(f"rank {self._groups.rank}: {text}", file=sys.stderr, flush=True)


def _copy_file(source: Path, target: Path) -> int:
    """Copy a file to the disk and return the checksum of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    checksum = 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return checksum


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as reader:
        while chunk := reader.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
