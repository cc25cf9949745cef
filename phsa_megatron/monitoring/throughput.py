"""Speed of training: tokens per second, time left, and the two FLOP numbers, always both.

A sparse attention makes a single "MFU" ambiguous, so there are two numbers with two names: the FLOPs this
run's attention really needs against what the devices could do (`perf/mfu_selected_frac`), and the FLOPs full
causal attention would have needed for the same documents (`perf/dense_equiv_tflops`). Both are counted from
the documents that were read, by `config/document_flops.py`.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

from phsa_megatron.config.document_flops import StepFlops

_LOG = logging.getLogger(__name__)
WINDOW_UPDATES = 20
"""Updates the speed is averaged over."""


class SpeedFacts(Protocol):
    """What is read of `config.derive.Derived`."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run over all processes."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all processes."""

    @property
    def flops_per_token_selected(self) -> float:
        """Forward and backward FLOPs a token of a full-length document, with the run's own attention."""

    @property
    def flops_per_token_dense(self) -> float:
        """The same with full causal attention."""

    @property
    def total_sequences(self) -> int:
        """Sequences of the whole run."""

    @property
    def world_size(self) -> int:
        """Processes, one a device."""


class Throughput:
    """Turns (seconds, tokens) into the speed metrics of the table."""

    def __init__(
        self, derived: SpeedFacts, *, consumed_tokens: int, peak_tflops: float | None = None
    ) -> None:
        """Start measuring.

        Args:
            derived: the size of the run, and FLOPs per token for the print at the start.
            consumed_tokens: Tokens already trained on: 0, or the resumed state's count. The time left
                follows from it.
            peak_tflops: `cluster.peak_tflops`, the peak of one device in TFLOP/s; None leaves utilization
                out.
        """
        self._derived = derived
        self._consumed_tokens = consumed_tokens
        self._peak_tflops = peak_tflops
        self._window: deque[tuple[float, int, StepFlops]] = deque(maxlen=WINDOW_UPDATES)
        self._warming_up = True
        self._peak_refused = False

    def update(self, seconds: float, tokens: int, flops: StepFlops) -> dict[str, float]:
        """Take in the time, tokens and FLOPs since the last update.

        Args:
            seconds: Wall time spent on steps, without evaluations and saves; more than 0.
            tokens: Tokens of those steps over all processes; more than 0.
            flops: What the documents of those steps needed, over all processes.

        Returns:
            Metrics by name: step time, smoothed tokens/s, time left, both FLOP numbers. The first update of
            a process holds compilation and warm-up, so it leaves the average as soon as there is a second.

        Raises:
            ValueError: seconds or tokens is not above 0.
        """
        if seconds <= 0 or tokens <= 0:
            raise ValueError(f"seconds and tokens must be above 0, got {seconds!r} and {tokens!r}")
        if self._warming_up and self._window:
            self._window.clear()
            self._warming_up = False
        self._window.append((seconds, tokens, flops))
        self._consumed_tokens += tokens
        window_s = sum(s for s, _, _ in self._window)
        tokens_per_s = sum(t for _, t, _ in self._window) / window_s
        device_tflop_s = window_s * self._derived.world_size * 1e12
        remaining_tokens = max(0, self._derived.total_tokens - self._consumed_tokens)
        values = {
            "perf/step_time_s": seconds * self._derived.tokens_per_step / tokens,
            "perf/tokens_per_s": tokens_per_s,
            "progress/eta_s": remaining_tokens / tokens_per_s,
            "perf/dense_equiv_tflops": sum(f.dense for _, _, f in self._window) / device_tflop_s,
        }
        utilization = self._utilization(sum(f.selected for _, _, f in self._window) / device_tflop_s)
        if utilization is not None:
            values["perf/mfu_selected_frac"] = utilization
        return values

    def equations(self) -> list[str]:
        """Return the formulas with this run's numbers, to be printed before the first step."""
        derived = self._derived
        length = derived.total_tokens // derived.total_sequences
        lines = [
            "perf/dense_equiv_tflops = FLOPs of the documents with full causal attention / seconds / devices "
            f"/ 1e12; devices = {derived.world_size}",
        ]
        if self._peak_tflops is None:
            lines.append("perf/mfu_selected_frac is left out: cluster.peak_tflops is not set")
        else:
            lines.append(
                "perf/mfu_selected_frac = FLOPs of the documents with this run's attention / seconds / "
                f"devices / peak; peak = cluster.peak_tflops = {self._peak_tflops:g} TFLOP/s a device"
            )
        lines += [
            f"causal factor = n (n + 1) / 2 of n x n (query, key) pairs = {(length + 1) / (2 * length):.5f} "
            f"at n = {length:,}: the pairs in the future are counted in neither number",
            "both count forward and backward without recomputation, from the real lengths of the packed "
            f"documents and the k of each step; a document of {length:,} tokens needs "
            f"{derived.flops_per_token_selected:.4g} FLOPs a token with this run's attention and "
            f"{derived.flops_per_token_dense:.4g} with full causal attention, shorter ones fewer",
        ]
        return lines

    def _utilization(self, device_tflops: float) -> float | None:
        """Return the utilization, None without a peak or if the formula gives more than is possible."""
        if self._peak_tflops is None:
            return None
        utilization = device_tflops / self._peak_tflops
        if utilization <= 1:
            return utilization
        # A number for people must not end a run, and a wrong one must not be shown: leave it out and say
        # why, once.
        if not self._peak_refused:
            self._peak_refused = True
            _LOG.warning(
                "perf/mfu_selected_frac would be %.3g and is left out: no device does more than its peak, so "
                "cluster.peak_tflops=%g is too small for this device and dtype.",
                utilization,
                self._peak_tflops,
            )
        return None
