"""Speed of training: tokens per second, time left, and the two FLOP numbers, always both.

A sparse attention makes a single "MFU" ambiguous, so there are two numbers with two names: the FLOPs this
run's attention really needs against what the devices could do (`perf/mfu_selected_frac`), and the FLOPs full
causal attention would have needed for the same tokens (`perf/dense_equiv_tflops`).
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Protocol

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
        """Forward and backward FLOPs a token, with the run's own attention."""

    @property
    def flops_per_token_dense(self) -> float:
        """Forward and backward FLOPs a token, with full causal attention."""

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
            derived: FLOPs per token and the size of the run.
            consumed_tokens: Tokens already trained on: 0, or the resumed state's count. The time left
                follows from it.
            peak_tflops: `cluster.peak_tflops`, the peak of one device in TFLOP/s; None leaves utilization
                out.
        """
        self._derived = derived
        self._consumed_tokens = consumed_tokens
        self._peak_tflops = peak_tflops
        self._window: deque[tuple[float, int]] = deque(maxlen=WINDOW_UPDATES)
        self._warming_up = True
        self._peak_refused = False

    def update(self, seconds: float, tokens: int) -> dict[str, float]:
        """Take in the time and tokens since the last update.

        Args:
            seconds: Wall time spent on steps, without evaluations and saves; more than 0.
            tokens: Tokens of those steps over all processes; more than 0.

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
        self._window.append((seconds, tokens))
        self._consumed_tokens += tokens
        tokens_per_s = sum(t for _, t in self._window) / sum(s for s, _ in self._window)
        remaining_tokens = max(0, self._derived.total_tokens - self._consumed_tokens)
        values = {
            "perf/step_time_s": seconds * self._derived.tokens_per_step / tokens,
            "perf/tokens_per_s": tokens_per_s,
            "progress/eta_s": remaining_tokens / tokens_per_s,
            "perf/dense_equiv_tflops": self._device_tflops(tokens_per_s, self._derived.flops_per_token_dense),
        }
        utilization = self._utilization(tokens_per_s)
        if utilization is not None:
            values["perf/mfu_selected_frac"] = utilization
        return values

    def equations(self) -> list[str]:
        """Return the formulas with this run's numbers, to be printed before the first step."""
        derived = self._derived
        lines = [
            "perf/dense_equiv_tflops = tokens/s x FLOPs per token with full causal attention / devices / 1e12"
            f" = tokens/s x {derived.flops_per_token_dense:.4g} / {derived.world_size} / 1e12",
        ]
        if self._peak_tflops is None:
            lines.append("perf/mfu_selected_frac is left out: cluster.peak_tflops is not set")
        else:
            lines.append(
                "perf/mfu_selected_frac = tokens/s x FLOPs per token with this run's attention / devices / "
                "peak"
                f" = tokens/s x {derived.flops_per_token_selected:.4g} / {derived.world_size}"
                f" / {self._peak_tflops:g}e12"
            )
        lines.append(
            "both count forward and backward without recomputation, and attention over full-length "
            "sequences: shorter packed documents need less"
        )
        return lines

    def _device_tflops(self, tokens_per_s: float, flops_per_token: float) -> float:
        return tokens_per_s * flops_per_token / self._derived.world_size / 1e12

    def _utilization(self, tokens_per_s: float) -> float | None:
        """Return the utilization, None without a peak or if the formula gives more than is possible."""
        if self._peak_tflops is None:
            return None
        utilization = (
            self._device_tflops(tokens_per_s, self._derived.flops_per_token_selected) / self._peak_tflops
        )
        if utilization <= 1:
            return utilization
        # A number for people must not end a run, and a wrong one must not be shown: leave it out and say
        # why, once.
        if not self._peak_refused:
            self._peak_refused = True
            _LOG.warning(
                "perf/mfu_selected_frac would be %.3g and is left out: no device does more than its peak. "
                "Either cluster.peak_tflops=%g is too small for this device, or most documents are far "
                "shorter than data.seq_len_tokens, which the formula counts in full.",
                utilization,
                self._peak_tflops,
            )
        return None
