"""The step of a new token as a CUDA graph: one launch instead of hundreds, at any length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARMUP_CALLS = 2


class DecodeGraph:
    """Captures a step at its first call and replays it after that.

    Args:
        step: (tokens int64 [B], lengths int32 [B]) -> logits; nothing in it waits for the device.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits of a step; they are overwritten by the next call."""
        if self._graph is None:
            self._capture(tokens)
        self._tokens.copy_(tokens)
        self._lengths.copy_(lengths)
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _capture(self, tokens: Tensor) -> None:
        # Sequences of no token: warming up compiles kernels and writes nothing into the caches.
        self._tokens, self._lengths = tokens.clone(), torch.zeros_like(tokens, dtype=torch.int32)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_CALLS):
                self._step(self._tokens, self._lengths)
        torch.cuda.current_stream(self._device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step(self._tokens, self._lengths)
