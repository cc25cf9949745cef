"""Rules of `compute.cuda_graphs`: what a recorded pass cannot hold. Used by `compute_rules.py`."""

from __future__ import annotations

from collections.abc import Iterator

from phsa_megatron.config.rule_messages import broken
from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    CudaGraphs,
    Device,
    KernelImpl,
    Layers,
    Loss,
    Recompute,
    Selector,
    TopkSchedule,
    TrainConfig,
)
from phsa_megatron.config.selector_kinds import EAGER_ONLY


def cuda_graphs(config: TrainConfig) -> Iterator[str]:
    """Refuse what a recording of a micro-batch's passes cannot hold."""
    if config.compute.cuda_graphs == CudaGraphs.none:
        return
    if config.cluster.device == Device.cpu:
        reasons = [("graphs are CUDA's (cluster.device=cpu)", "set cluster.device=cuda")]
    else:
        reasons = [*_layout(config), *_passes(config), *_attention(config)]
    for rule, fix in reasons:
        yield broken(
            "compute.cuda_graphs", config.compute.cuda_graphs, rule, f"{fix}, or compute.cuda_graphs=none"
        )


def _layout(config: TrainConfig) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    sizes = ("tensor_size", "pipeline_size", "expert_size")
    wide = [f"parallel.{name}={getattr(parallel, name)}" for name in sizes if getattr(parallel, name) > 1]
    if wide:
        yield (
            f"a recording holds no communication but the exchange of keys ({', '.join(wide)})",
            "set these sizes to 1",
        )
    if parallel.context_size > 1 and parallel.context_exchange != ContextExchange.all_gather:
        yield (
            f"the host has to know which blocks are sent (parallel.context_exchange="
            f"{parallel.context_exchange})",
            "set parallel.context_exchange=all_gather",
        )
    # The wrapper starts both from inside of the passes, and a replay runs no Python.
    overlaps = ("overlap_grad_reduce", "overlap_param_gather")
    on = [f"parallel.{name}" for name in overlaps if getattr(parallel, name)]
    if on:
        yield (
            f"a recording holds no communication but the exchange of keys ({', '.join(on)})",
            f"set {' and '.join(on)} to false",
        )


def _passes(config: TrainConfig) -> Iterator[tuple[str, str]]:
    compute, parallel, model = config.compute, config.parallel, config.model
    if parallel.recompute != Recompute.none:
        yield (
            f"megatron reads the random generators' state in a pass that is recomputed "
            f"(parallel.recompute={parallel.recompute})",
            "set parallel.recompute=none",
        )
    if compute.loss != Loss.chunked:
        yield f"it is made for the chunked loss (compute.loss={compute.loss})", "set compute.loss=chunked"
    if compute.layers != Layers.local or compute.fused_weight_gradient:
        yield (
            f"it is made for megatron's own linear layers (compute.layers={compute.layers}, "
            f"compute.fused_weight_gradient={compute.fused_weight_gradient})",
            "set compute.layers=local and compute.fused_weight_gradient=false",
        )
    if model.num_experts or model.mtp_num_layers:
        yield (
            f"experts and multi-token prediction count on the host (model.num_experts={model.num_experts}, "
            f"model.mtp_num_layers={model.mtp_num_layers})",
            "set both to 0",
        )


def _attention(config: TrainConfig) -> Iterator[tuple[str, str]]:
    attention = config.attention
    random = (TopkSchedule.random_step, TopkSchedule.random_layer)
    if attention.topk_schedule in random or attention.align_coeff:
        yield (
            f"every step would need a recording of its own (attention.topk_schedule="
            f"{attention.topk_schedule}, attention.align_coeff={attention.align_coeff})",
            "set attention.topk_schedule to constant or anneal, and attention.align_coeff=0",
        )
    dense = attention.kind == AttentionKind.dense or attention.dense_layers or attention.topk_dense_steps
    windowed = attention.kind == AttentionKind.phsa and attention.selector == Selector.dense_window
    if (dense or windowed) and config.data.isolate_documents:
        yield (
            "dense attention takes documents one by one, each batch others (data.isolate_documents=true)",
            "set data.isolate_documents=false",
        )
    eager = attention.selector in EAGER_ONLY or attention.impl != KernelImpl.triton
    if attention.kind == AttentionKind.phsa and not windowed and eager:
        yield (
            f"eager choice waits for the device (attention.selector={attention.selector}, "
            f"attention.impl={attention.impl})",
            "take a selector with kernels and attention.impl=triton",
        )
