"""Rules of `compute`: what an implementation needs, and what it cannot do. Used by `validate.py`."""

from __future__ import annotations

from collections.abc import Iterator

from phsa_megatron.config.graph_rules import cuda_graphs
from phsa_megatron.config.rule_messages import Rule, broken
from phsa_megatron.config.schema import Device, Elementwise, Fp8, Layers, Loss, Norm, Recompute, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector

WIDEST_NORM = 16384
"""Numbers of a row of compute.norm=triton at most: a row is in one program's registers."""


def _chunked_loss(config: TrainConfig) -> Iterator[str]:
    if config.compute.loss == Loss.chunked and config.model.mtp_num_layers:
        yield broken(
            "compute.loss",
            config.compute.loss,
            f"megatron computes the losses of multi-token prediction (model.mtp_num_layers="
            f"{config.model.mtp_num_layers}) from whole logits",
            "set compute.loss=whole, or model.mtp_num_layers=0",
        )


def _needs_gpu(config: TrainConfig, name: str, why: str, instead: object) -> Iterator[str]:
    """Refuse the value of a setting of `compute` on the CPU; `instead` is what works there."""
    if config.cluster.device == Device.cpu:
        yield broken(
            f"compute.{name}",
            getattr(config.compute, name),
            f"{why} (cluster.device=cpu)",
            f"set compute.{name}={instead}, or cluster.device=cuda",
        )


def _compiled(config: TrainConfig) -> Iterator[str]:
    if config.compute.elementwise == Elementwise.compiled:
        yield from _needs_gpu(
            config, "elementwise", "nothing is compiled on the CPU", Elementwise.unfused.value
        )


def _norm(config: TrainConfig) -> Iterator[str]:
    if config.compute.norm != Norm.triton:
        return
    yield from _needs_gpu(config, "norm", "Triton's kernels need a GPU", Norm.torch.value)
    if config.model.hidden_size > WIDEST_NORM:
        yield broken(
            "compute.norm",
            config.compute.norm,
            f"its kernels hold rows of up to {WIDEST_NORM} numbers (model.hidden_size="
            f"{config.model.hidden_size})",
            "set compute.norm=torch",
        )
    if config.compute.layers == Layers.transformer_engine:
        yield broken(
            "compute.norm",
            config.compute.norm,
            "Transformer Engine's layers have norms of their own (compute.layers=transformer_engine)",
            "set compute.norm=torch, or compute.layers=local",
        )


def _recompute_layers(config: TrainConfig) -> Iterator[str]:
    parallel, layers = config.parallel, config.parallel.recompute_layers
    if layers is None:
        return
    if parallel.recompute != Recompute.full:
        yield broken(
            "parallel.recompute_layers",
            layers,
            f"it counts layers that are recomputed as a whole, and parallel.recompute={parallel.recompute}",
            "set parallel.recompute=full, or parallel.recompute_layers=null",
        )
    chunk = config.model.num_layers // (parallel.pipeline_size * (parallel.virtual_pipeline_size or 1))
    if layers > chunk:
        yield broken(
            "parallel.recompute_layers",
            layers,
            f"a model chunk has {chunk} layers",
            f"use at most {chunk}, or null for all",
        )


def _fp8(config: TrainConfig) -> Iterator[str]:
    compute = config.compute
    if compute.fp8 != Fp8.none and compute.layers != Layers.transformer_engine:
        yield broken(
            "compute.fp8",
            compute.fp8,
            f"FP8 products are Transformer Engine's, and compute.layers={compute.layers}",
            "set compute.layers=transformer_engine, or compute.fp8=none",
        )


def _transformer_engine(config: TrainConfig) -> Iterator[str]:
    if config.compute.layers != Layers.transformer_engine:
        return
    yield from _needs_gpu(config, "layers", "Transformer Engine needs a GPU", Layers.local.value)
    if learned_selector(config.attention):
        yield broken(
            "compute.layers",
            config.compute.layers,
            f"attention.selector={config.attention.selector} reads the layer's input after its norm, which "
            "Transformer Engine has inside a product",
            "set compute.layers=local",
        )


def _fused_weight_gradient(config: TrainConfig) -> Iterator[str]:
    if config.compute.fused_weight_gradient:
        why = "apex adds weight gradients to their sums on a GPU"
        yield from _needs_gpu(config, "fused_weight_gradient", why, "false")


COMPUTE_RULES: tuple[Rule, ...] = (
    _chunked_loss,
    _compiled,
    _norm,
    _recompute_layers,
    _fp8,
    _transformer_engine,
    _fused_weight_gradient,
    cuda_graphs,
)
"""All of them, in the order of their messages."""
