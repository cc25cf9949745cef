"""The settings of `compute`: how the parts around attention are computed. The mathematics stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Loss(StrEnum):
    """How logits become the loss."""

    whole = "whole"
    chunked = "chunked"


class Elementwise(StrEnum):
    """How RoPE and SwiGLU are computed."""

    unfused = "unfused"
    compiled = "compiled"


class Norm(StrEnum):
    """Whose RMSNorm it is."""

    torch = "torch"
    triton = "triton"


class Adam(StrEnum):
    """Whose AdamW updates the weights."""

    auto = "auto"
    torch = "torch"
    apex = "apex"
    transformer_engine = "transformer_engine"


class Layers(StrEnum):
    """Whose linear layers and norms a transformer layer is made of."""

    local = "local"
    transformer_engine = "transformer_engine"


class CudaGraphs(StrEnum):
    """What is recorded once and replayed by one launch."""

    none = "none"
    micro_batch = "micro_batch"


class Fp8(StrEnum):
    """Scaling recipe of FP8 linear layers."""

    none = "none"
    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"


@dataclass
class ComputeConfig:
    """Implementations of what surrounds attention: docs/full_size.md."""

    loss: Loss = Loss.whole
    """whole: logits of all tokens of a micro-batch and their fp32 softmax exist at once; chunked: logits of
    loss_chunk_tokens tokens at a time, and gradients are made where they are."""
    loss_chunk_tokens: int = 4096
    """Tokens whose logits exist at once with loss=chunked; unused otherwise."""
    elementwise: Elementwise = Elementwise.unfused
    """unfused: chains of torch operations; compiled: RoPE and SwiGLU in one kernel each, by torch.compile,
    and less is kept for the backward pass. Refused on the CPU, where nothing would be compiled."""
    norm: Norm = Norm.torch
    """torch: its fused RMSNorm; triton: two kernels of ours, about twice as fast. Refused on the CPU."""
    adam: Adam = Adam.auto
    """auto: Transformer Engine's if it is installed, else apex's, else torch's (fused on a GPU); a library
    that is asked for by name is used, or refused where it is absent."""
    fused_weight_gradient: bool = False
    """Weight gradients are added to their fp32 sums inside the matrix product; needs NVIDIA's apex with its
    CUDA extensions."""
    layers: Layers = Layers.local
    """local: megatron's own linear layers with our RMSNorm; transformer_engine: those of Transformer Engine,
    norms inside the products, with the same attention in them."""
    fp8: Fp8 = Fp8.none
    """Linear layers in FP8 with this scaling recipe; needs layers=transformer_engine."""
    cuda_graphs: CudaGraphs = CudaGraphs.none
    """micro_batch: forward and backward pass of a micro-batch are recorded as CUDA graphs and replayed, so
    that the host need not launch every kernel; the same kernels, to the last bit. With data and context
    parallelism (context_exchange=all_gather), without recomputation, for PHSA by Triton or dense attention
    over whole sequences; refused elsewhere."""
