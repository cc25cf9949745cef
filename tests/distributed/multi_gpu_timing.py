"""Times of training steps under context parallelism, beside one GPU, dense attention and the plan.

A case is a real `train_step` of a recipe's model on random tokens: forward, backward, reduction, optimizer.
Weights are fresh and tokens random, so that neighbouring queries share hardly any selected block: the
block-sparse exchange then sends nearly all keys. `documents` cuts a row into so many, as packing does, and a
process needs only the blocks of documents that it holds a part of.

`graphs`: both passes replayed (`compute.cuda_graphs=micro_batch`), where the host is the slower side.
Where a whole model or its logits do not fit, a case has fewer layers or a smaller vocabulary: both are in its
row. Steps of `8b` are of 1 and of 3 layers; their difference is two layers' time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.autograd import DeviceType

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch, TrainConfig
from phsa_megatron.data.batches import Batch
from phsa_megatron.parallel.exchange import traffic
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import train_step
from tests.distributed.multi_gpu_groups import KeptGroups, Laps

SMALL_VOCAB = 8192
COMPILE_S = 60.0
"""Beyond the time of a case whose kernels are on the disk already."""
TINY = [
    "recipe=phsa_0p6b_pretrain_8gpu_h100_bf16_32k", "cluster=local_cpu", "run.dtype=fp32",
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_query_heads=4", "model.num_kv_heads=2",
    "model.head_dim=8", "attention.impl=reference", "attention.block_tokens=4", "attention.init_tokens=4",
    "attention.local_tokens=8", "compute.norm=torch",
]  # fmt: skip

GRAPHS = [
    "compute.cuda_graphs=micro_batch",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
]


def case(model: str, seq_len: int, context: int, **more: Any) -> dict[str, Any]:
    """Return a case; `context` = 1 is one process alone."""
    made = {
        "kind": "timing", "model": model, "seq_len": seq_len, "context": context, "attention": "phsa",
        "exchange": "all_gather", "layers": None, "vocab": None, "documents": 1, "steps": 3, "timeout_s": 90,
        "recompute": "full", "graphs": False,
    } | more  # fmt: skip
    parts = [model, f"{seq_len // 1024}k", f"cp{context}", made["attention"]]
    if context > 1 and made["attention"] == "phsa":
        parts.append(made["exchange"])
    parts += [f"{made['layers']}layers"] if made["layers"] else []
    parts += [f"{made['documents']}documents"] if made["documents"] > 1 else []
    parts += ["graphs"] if made["graphs"] else []
    return made | {"name": "_".join(parts)}


def cases(processes: int, size: str) -> list[dict[str, Any]]:
    """Return a run's cases, the most telling first; of a few, those of one process before the others."""
    sizes = [1, *(n for n in (8, 4, 2) if n <= processes)]
    if size != "gpu":
        tiny = [case("tiny", 1024, n, layers=2, vocab=128, steps=1) for n in (1, 2)[:processes]]
        return [
            *tiny,
            *([tiny[1] | {"exchange": "block_sparse", "name": "tiny_sparse"}] if processes > 1 else []),
        ]
    ways = [(1, "all_gather")] + [(n, way) for n in sizes[1:] for way in ("all_gather", "block_sparse")]
    small = {"vocab": SMALL_VOCAB}
    found = [case("0p6b", 131072, n, exchange=way, **small) for n, way in ways]
    for layers in (1, 3):
        found += [case("8b", 131072, n, exchange=way, layers=layers, **small) for n, way in ways]
    found.sort(key=lambda one: (one["context"] > 1, -one["context"]))  # few changes of groups
    last = max(sizes)
    dense = small | {"attention": "dense", "steps": 2}
    if last > 1:
        for layers in (1, 3):
            found += [
                case("8b", 524288, last, exchange=way, layers=layers, steps=2, **small)
                for way in ("all_gather", "block_sparse")
            ]
    for model in ("8b", "0p6b"):
        found += [case(model, 131072, last, layers=layers, **dense) for layers in (1, 3)]
    if last > 1:
        for way in ("all_gather", "block_sparse"):
            found.append(case("0p6b", 131072, last, exchange=way, documents=16, **small))
        found += [case("0p6b", 131072, 1, layers=layers, **dense) for layers in (1, 3)]
    short = {"recompute": "none"}
    for n in sizes:
        found += [case("0p6b", 32768, n, exchange=way, **short) for size, way in ways if size == n]
        found.append(case("0p6b", 32768, n, graphs=True, **short))
    return _with_compilation(found)


def _with_compilation(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the first case of a model, kind of attention and exchange the time to compile its kernels."""
    seen: set[tuple[Any, ...]] = set()
    for one in found:
        kernels = (one["model"], one["attention"], one["context"] > 1, one["exchange"])
        if kernels not in seen:
            one["timeout_s"] += COMPILE_S
            seen.add(kernels)
    return found


def compiled_shapes(case: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the shapes of compiled functions follow from.

    Where it changes the compiler has to forget: a second shape would get kernels for any size, and a run of
    its own gets none of those.
    """
    return case["model"], case["seq_len"] // case["context"], case["vocab"]


def config_of(case: dict[str, Any], processes: int) -> TrainConfig:
    """Return the settings of a case; processes beyond its context-parallel group are copies of the model."""
    context = case["context"]
    used = 1 if context == 1 else processes
    if case["model"] == "tiny":
        settings = list(TINY)
    else:
        settings = [f"recipe={case['attention']}_{case['model']}_pretrain_8gpu_h100_bf16_32k"]
    settings += [
        "run.name=multi_gpu", "parallel.tensor_size=1", "parallel.sequence_parallel=false",
        f"parallel.recompute={case['recompute']}", f"parallel.context_size={context}",
        f"parallel.context_exchange={case['exchange']}", f"cluster.processes_per_node={used}",
        f"data.seq_len_tokens={case['seq_len']}", f"optim.global_batch_sequences={used // context}",
        "optim.micro_batch_sequences=1", "data.max_documents_per_sequence=16",
    ]  # fmt: skip
    settings += [f"model.num_layers={case['layers']}"] if case["layers"] else []
    settings += [f"model.vocab_size={case['vocab']}"] if case["vocab"] else []
    settings += GRAPHS if case["graphs"] else []
    return run_to_plan(settings)


def batch_of(config: TrainConfig, documents: int) -> Batch:
    """Return one sequence of random tokens, cut into documents of equal length."""
    length, vocab = config.data.seq_len_tokens, config.model.vocab_size
    tokens = torch.randint(0, vocab, (1, length + 1), generator=torch.Generator().manual_seed(0))
    bounds = torch.full((documents_limit(config.data) + 1,), length, dtype=torch.int32)
    bounds[:documents] = torch.arange(documents, dtype=torch.int32) * (length // documents)
    mask = torch.ones(1, length)
    mask[0, -1] = 0.0
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=mask,
        position_ids=torch.arange(length)[None],
        cu_seqlens=bounds,
        domains=["random"],
        sources=["random"],
        pieces=[()],
        num_overflow_tokens=0,
        document_tokens=bounds.diff().tolist(),
    )


def run_case(case: dict[str, Any], processes: int, kept: KeptGroups, quiet: Path) -> dict[str, Any]:
    """Time a case and return its row on process 0; a case of one process leaves the others out.

    The step that compiles does not wait for `quiet`, a file; those that are timed do.
    """
    config, laps = config_of(case, processes), Laps()
    with kept.of(config) as groups:
        if groups is None:
            return {}
        laps.end("groups_s")
        row = _measure(config, groups, case, laps, quiet)
    # Megatron caches angles by the layer that made them, whose hooks hold the model and its gradients.
    RotaryEmbedding.forward.cache_clear()
    gc.collect()
    return row if groups.rank == 0 else {}


@contextmanager
def repeated_weights() -> Iterator[None]:
    """Weights repeat a million random numbers: to draw them all takes longer than the steps."""
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))  # a prime: rows differ

    def normal(
        tensor: torch.Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None
    ) -> torch.Tensor:
        with torch.no_grad():
            flat = tensor.view(-1)
            for part in flat.split(len(numbers)):
                part.copy_(mean + std * numbers[: len(part)])
        return tensor

    with mock.patch.object(torch.nn.init, "normal_", normal):
        yield


def _measure(
    config: TrainConfig, groups: Groups, case: dict[str, Any], laps: Laps, quiet: Path
) -> dict[str, Any]:
    on_gpu = groups.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with repeated_weights():
        parts = build_parts(config, groups)
    table = PunctuationTable.build(
        ["." if token % 16 == 0 else "a" for token in range(config.model.vocab_size)],
        PunctuationMatch.exact,
        PunctuationLanguage.en,
    ).to(groups.device)
    batches = [batch_of(config, case["documents"])]
    state, progress = TrainState(), Progress()
    laps.end("build_s")

    def step() -> float:
        groups.barrier()
        began_s = time.perf_counter()
        train_step(parts, batches, table, state, progress)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    first_s = step()
    if case["graphs"]:
        step()  # records
    laps.end("compile_s")
    while not quiet.exists():
        time.sleep(0.05)
    laps.end("wait_s")
    traffic.take()
    times = [step() for _ in range(case["steps"])]
    sent = traffic.take()[0] / len(times)
    slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=groups.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    step_s = float(slowest)
    row = {
        **{key: case[key] for key in ("model", "seq_len", "context", "attention", "exchange", "documents")},
        "layers": config.model.num_layers, "vocab": config.model.vocab_size, "step_s": step_s,
        "steps_s": times, "first_step_s": first_s, "gpus": groups.world_size,
        "tokens_per_s": config.optim.global_batch_sequences * config.data.seq_len_tokens / step_s,
        "sent_mib": sent / 2**20, "recompute": config.parallel.recompute.value,
    }  # fmt: skip
    laps.end("timed_s")
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["launch_us"] = _launch_us(groups.device)
        row |= _planned(config)
        try:
            row |= _communication(step)
        except RuntimeError as error:  # the times are there: a profiler that does not start costs its own
            row["profile_error"] = str(error)[:500]
    laps.end("profile_s")
    return row | laps.seconds


def _launch_us(device: torch.device, launches: int = 1000) -> float:
    """Return what the host takes for one small kernel: below this no step can be made of launches."""
    numbers = torch.zeros(16, device=device)
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(launches):
        numbers.add_(1.0)
    torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / launches * 1e6


def _planned(config: TrainConfig) -> dict[str, Any]:
    """Return the plan's prediction; it knows the exchange of all keys only."""
    if config.parallel.context_exchange.value != "all_gather":
        return {}
    try:
        machine = Machine.of(config)
        plan = Estimator(config, machine).estimate(config)
    except ConfigError as error:
        return {"plan_error": str(error)}
    return {
        "plan_step_s": plan.time.step_s,
        "plan_gib": plan.memory.total_gib,
        "plan_context_s": plan.time.context_s,
        "plan_data_s": plan.time.data_s,
    }


def _communication(step: Any) -> dict[str, float]:
    """Return where the device's time of one more step goes; see `device_times`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
    return device_times(seen.events())


def device_times(events: Iterable[Any]) -> dict[str, float]:
    """Return seconds of NCCL's kernels, of those beside no other kernel, and of the others.

    A collective's kernel runs from its start here until the last process has sent: waiting is in it. The
    first one is the barrier before the step, in which processes wait for each other's profiler.

    Args:
        events: of torch's profiler; times in microseconds.
    """
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        # Annotations span what was launched inside them, gaps included.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            span = (event.time_range.start, event.time_range.end)
            spans["nccl" in event.name.lower()].append(span)
    sending, computing = joined(sorted(spans[True])[1:]), joined(spans[False])
    both = joined([*sending, *computing])
    nccl_s, computing_s, both_s = (sum(e - s for s, e in part) / 1e6 for part in (sending, computing, both))
    return {"nccl_s": nccl_s, "nccl_exposed_s": both_s - computing_s, "computing_s": computing_s}


def joined(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of intervals as intervals that do not touch, ascending."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
