"""Pooling: one program sums one block of one head."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import load_rows, row_offset


@triton.jit
def pool_kernel(
    K,
    W,
    OUT,
    BLOCK_START,
    stride_kt,
    stride_kh,
    stride_wt,
    stride_wh,
    stride_ob,
    stride_oh,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """OUT[b, h] = sum over the block's tokens of w * k, in fp32, rounded once; zero past the last block."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(BLOCK_START + block)
    token = start + tl.arange(0, BLOCK)
    ok = (token >= 0) & (start >= 0)
    keys = load_rows(K, token, head, stride_kt, stride_kh, ok, D).to(tl.float32)
    if HAS_WEIGHTS:
        weight = tl.load(W + row_offset(token, head, stride_wt, stride_wh), mask=ok, other=0.0)
        total = tl.sum(keys * weight.to(tl.float32)[:, None], 0)
    else:
        total = tl.sum(keys, 0) / BLOCK
    out = OUT + row_offset(block, head, stride_ob, stride_oh) + tl.arange(0, D)
    tl.store(out, total.to(OUT.dtype.element_ty))
