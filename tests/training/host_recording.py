"""Recordings of CUDA graphs on a machine without a GPU: a stand-in, and a training run that uses it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from phsa_megatron import train
from phsa_megatron.parallel.exchange import traffic
from phsa_megatron.training import micro_batch_graph, run
from phsa_megatron.training.micro_batch_graph import MicroBatchGraph


class HostRecording:
    """Computes at every replay, into the same tensors.

    The bytes sent in a replay are counted once, as those of the recording that CUDA would replay.
    """

    made: list[HostRecording] = []

    def __init__(self, work, stream, pool):
        self.work, self.pool, self.result, self.released = work, "a pool", None, False
        assert pool == ("a pool" if len(self.made) % 2 else None), (
            "the backward pass shares the forward's memory"
        )
        self.made.append(self)

    def replay(self):
        assert not self.released
        sent = [0, 0]
        with traffic.apart(sent):
            result = self.work()
        traffic.again(sent)
        if result is not None:
            if self.result is None:
                self.result = result
            for kept, new in zip(self.result, result, strict=True):
                kept.copy_(new)
        return self.result

    def release(self):
        self.released = True


def stand_in(patch: Callable[[Any, str, Any], None]) -> None:
    """Put the stand-in in CUDA's place, by `patch(owner, name, value)`."""
    patch(micro_batch_graph, "Recording", HostRecording)
    patch(torch.cuda, "Stream", lambda device: None)
    patch(MicroBatchGraph, "on_own_stream", lambda self: nullcontext())


def main(config_file: str) -> int:
    """Train a run whose steps are recorded; the rules would refuse that on a CPU."""
    stand_in(setattr)
    build = run.build_parts

    def build_recorded(*arguments: Any) -> Any:
        parts = build(*arguments)
        parts.graph = MicroBatchGraph(torch.device("cpu"))
        print("recorded on the host", flush=True)
        return parts

    run.build_parts = build_recorded
    code: int = train.main(config_file)
    assert len(HostRecording.made) >= 2, "nothing was recorded"
    return code
