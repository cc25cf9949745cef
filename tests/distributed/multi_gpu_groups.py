"""Process groups that stay from one case of `multi_gpu.py` to the next, and what a case's time goes to.

Megatron makes about twenty groups for every start, and NCCL connects each at once: on two H100s that took
most of the ten seconds of a case whose step takes a fraction of one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.parallel.groups import Groups, initialize


class KeptGroups:
    """The groups of the case before, for a case whose processes stand in the same places."""

    def __init__(self) -> None:
        self._places: tuple[int | None, ...] = ()
        self._groups: Groups | None = None

    @contextmanager
    def of(self, config: TrainConfig) -> Iterator[Groups | None]:
        """Groups for a case, or None where this process has no part in it: one process is number 0 alone.

        All processes of a job take the same cases in the same order: they make and leave groups together.
        """
        places = _places(config)
        if places != self._places:
            self.close()
        names = ("RANK", "WORLD_SIZE") if places[0] == 1 else ()
        if names and os.environ.get("RANK", "0") != "0":
            yield None
            return
        hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
        try:
            if self._groups is None:
                self._groups, self._places = initialize(config), places
            yield replace(self._groups, context_sharding=config.parallel.context_sharding)
        finally:
            os.environ.update(hidden)

    def close(self) -> None:
        """Leave the groups, together with the other processes."""
        if self._groups is not None:
            self._groups.barrier()
            self._groups.close()
        self._groups, self._places = None, ()


def _places(config: TrainConfig) -> tuple[int | None, ...]:
    """Return what `initialize` makes groups from, the number of processes first."""
    cluster, layout = config.cluster, config.parallel
    return (
        cluster.num_nodes * cluster.processes_per_node, layout.tensor_size, layout.pipeline_size,
        layout.virtual_pipeline_size, layout.context_size, layout.context_node_size, layout.expert_size,
        config.model.num_experts,
    )  # fmt: skip


class Laps:
    """Seconds from one mark to the next, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.monotonic()

    def end(self, name: str) -> None:
        """Take the time since the mark before."""
        now_s = time.monotonic()
        self.seconds[name], self._last_s = round(now_s - self._last_s, 2), now_s
