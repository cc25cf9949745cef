"""What one check found, and the checks of a node's memory and of the run folder's disk."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil

from phsa_megatron.config.schema_health import HealthConfig

_WRITE_BYTES = 32 << 20
_CGROUP = Path("/sys/fs/cgroup")


class Status(StrEnum):
    """What follows from a check."""

    ok = "ok"
    bad = "bad"
    """This node must not take part."""
    unknown = "unknown"
    """It could not be checked."""
    not_applicable = "not applicable"
    """There is nothing to check here."""


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Attributes:
        name: what was looked at.
        status: what follows.
        found: what was measured.
        rule: what was asked for, with the setting that asks; empty where nothing is.
    """

    name: str
    status: Status
    found: str
    rule: str = ""

    def reason(self) -> str:
        """The line of a bad node."""
        return f"{self.name}: {self.found}; {self.rule}"


def judged(name: str, good: bool, found: str, rule: str) -> Check:
    """A check that is good or bad."""
    return Check(name, Status.ok if good else Status.bad, found, rule)


def memory(health: HealthConfig) -> Check:
    """Check the free memory of this host, or of the container around this process."""
    free_bytes = psutil.virtual_memory().available
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None:
        free_bytes = min(free_bytes, limit - used)
    free_gib = free_bytes / 2**30
    return judged(
        "host memory",
        free_gib >= health.min_free_memory_gib,
        f"{free_gib:.1f} GiB free",
        f"at least health.min_free_memory_gib={health.min_free_memory_gib:g} GiB",
    )


def _cgroup_number(name: str) -> int | None:
    try:
        text = (_CGROUP / name).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def disk(folder: Path, node: str, health: HealthConfig) -> list[Check]:
    """Check the space where the run folder is, and how fast this node writes there, to the disk itself.

    Args:
        folder: the run folder; it exists.
        node: name of this node, for a file of its own.
        health: thresholds.
    """
    try:
        status = os.statvfs(folder)
        free_gib = status.f_bavail * status.f_frsize / 2**30
        space = judged(
            "disk space",
            free_gib >= health.min_free_disk_gib,
            f"{free_gib:.1f} GiB free in {folder}",
            f"at least health.min_free_disk_gib={health.min_free_disk_gib:g} GiB",
        )
        mib_per_s = _write_speed(folder / f".preflight_{node}.tmp")
    except OSError as error:
        return [
            Check("run folder", Status.bad, f"{folder}: {error}", "this node can write to the run folder")
        ]
    speed = judged(
        "write speed",
        mib_per_s >= health.min_write_mib_per_s,
        f"{mib_per_s:.0f} MiB/s",
        f"at least health.min_write_mib_per_s={health.min_write_mib_per_s:g} MiB/s",
    )
    return [space, speed]


def _write_speed(path: Path) -> float:
    """MiB/s of a file that is on the disk when the clock stops."""
    content = os.urandom(_WRITE_BYTES)  # a file system that compresses must not look fast
    try:
        began_s = time.perf_counter()
        with path.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        return _WRITE_BYTES / 2**20 / (time.perf_counter() - began_s)
    finally:
        path.unlink(missing_ok=True)
