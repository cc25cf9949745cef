"""Where a step's time goes: kernels of one profiled step, grouped by what they are for."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

KINDS: tuple[tuple[str, str], ...] = (
    ("norms", r"rms|layer_?norm|gammabeta|rowwisemoments|cugrad|cucompute"),
    (
        "attention",
        "add_to_normalizer|normalizer_kernel|select_|count_kernel|chunk_sums|place_kernel|union_kernel|"
        "init_partial|window_dkdv|position_kernel|rows_kernel|key_tiles|dq_kernel|chosen_dkdv|forward_kernel|"
        "cu_blocks_kernel|pool_kernel|cudnn|fmha|flash|sdpa|attention|attend|_dkdv",
    ),
    ("linear layers", r"gemm|nvjet|cutlass|xmma|cublas|splitk|sm90_|s16816"),
    ("optimizer", r"multi_tensor|adam|lpnorm|foreach"),
    ("cross-entropy", r"triton_\w*(amax|eq|exp|gather)\w*|softmax"),
    ("SwiGLU", r"triton_\w*(silu|sigmoid|swiglu)|silu"),
    ("RoPE", r"triton_\w*(cat|neg|split)"),
    ("collectives", r"nccl"),
    ("embedding", r"embedding|radix|sort|index"),
    ("copies", r"memcpy|copy|memset|cat"),
    ("additions and other passes", r"elementwise|vectorized|reduce|add"),
)
"""Kinds and what the names of their kernels match, in lower case; the first that matches counts."""


def kind_of(kernel: str) -> str:
    """Return what a kernel is for, by its name."""
    lower = kernel.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), "other")


def profile_step(session: Any, folder: Path, name: str) -> dict[str, Any]:
    """Profile one step and return times by kind, by kernel, idle time and waits of the host.

    Args:
        session: an open `Session` whose settings are adopted and warm.
        folder: gets the trace, which is removed again.
        name: of the row.
    """
    with session.batches(2) as source:
        session.step(next(source))
        batches = next(source)
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities[: 1 if session.on_gpu else 2]) as profiler:
            start_s = time.perf_counter()
            session.step(batches)
            step_s = time.perf_counter() - start_s
    trace = folder / f"{name}.trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    trace.unlink()
    return summary(events, step_s) | {"name": name}


def summary(events: list[dict[str, Any]], step_s: float) -> dict[str, Any]:
    """Return a profile as plain numbers: milliseconds by kind, the longest kernels, busy and idle time.

    Args:
        events: of a Chrome trace of torch's profiler, times in microseconds.
        step_s: wall time of the profiled step.
    """
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    by_kernel: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in on_device:
        by_kernel[event["name"]][0] += 1
        by_kernel[event["name"]][1] += event["dur"] / 1e3
    by_kind: dict[str, float] = defaultdict(float)
    for kernel, (_, milliseconds) in by_kernel.items():
        by_kind[kind_of(kernel)] += milliseconds
    waits = Counter(e["name"] for e in events if "Synchronize" in e.get("name", "") and e.get("ph") == "X")
    busy_ms = _union_ms([(e["ts"], e["ts"] + e["dur"]) for e in on_device])
    longest = sorted(by_kernel.items(), key=lambda item: -item[1][1])
    return {
        "step_ms": round(step_s * 1e3, 2),
        "busy_ms": round(busy_ms, 2),
        "idle_ms": round(max(0.0, step_s * 1e3 - busy_ms), 2),
        "kinds_ms": {kind: round(ms, 2) for kind, ms in sorted(by_kind.items(), key=lambda i: -i[1])},
        "host_waits": dict(waits),
        "kernels": [
            {"name": kernel[:160], "calls": int(calls), "ms": round(ms, 3)}
            for kernel, (calls, ms) in longest[:70]
        ],
    }


def _union_ms(spans: list[tuple[float, float]]) -> float:
    """Return the milliseconds that are covered by at least one span, given in microseconds."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered / 1e3
