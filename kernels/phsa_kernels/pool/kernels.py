"""Pooling: where each document's blocks begin, and the weighted sum of every block."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.primitives import first_above, row_offset


@triton.jit
def cu_blocks_kernel(CU_SEQLENS, CU_BLOCKS, num_docs, BLOCK: tl.constexpr, B: tl.constexpr):
    """CU_BLOCKS int32 [N + 1] = the running sum of the documents' complete blocks; one program."""
    before = tl.zeros([1], tl.int32)
    tl.store(CU_BLOCKS + tl.arange(0, 1), before)
    for first in range(0, num_docs, B):
        doc = first + tl.arange(0, B)
        ok = doc < num_docs
        length = tl.load(CU_SEQLENS + doc + 1, mask=ok, other=0) - tl.load(CU_SEQLENS + doc, mask=ok, other=0)
        blocks = length // BLOCK
        tl.store(CU_BLOCKS + doc + 1, before + tl.cumsum(blocks, 0), mask=ok)
        before += tl.sum(blocks, 0)


@triton.jit
def pool_kernel(
    K,
    W,
    OUT,
    CU_SEQLENS,
    CU_BLOCKS,
    num_docs,
    doc_steps,
    num_blocks,
    stride_kt,
    stride_kh,
    stride_wt,
    stride_wh,
    stride_ob,
    stride_oh,
    HAS_WEIGHTS: tl.constexpr,
    VECTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
):
    """OUT[b, h] = sum over the block's tokens of w * k, in fp32, rounded once; zero past the last block.

    With VECTORS = 2 the same of each half with its own weights made to sum to 1, or its plain mean if they
    are all zero.
    """
    block = tl.program_id(0) * B + tl.arange(0, B)
    head = tl.program_id(1)
    inside = block < num_blocks
    doc = first_above(CU_BLOCKS, num_docs + 1, doc_steps, block, True) - 1
    some = inside & (doc < num_docs)
    doc = tl.where(some, doc, 0)
    start = tl.load(CU_SEQLENS + doc) + (block - tl.load(CU_BLOCKS + doc)) * BLOCK
    token = start[:, None] + tl.arange(0, BLOCK)[None, :]
    d = tl.arange(0, D)
    at = row_offset(token, head, stride_kt, stride_kh)[:, :, None] + d[None, None, :]
    keys = tl.load(K + at, mask=some[:, None, None], other=0.0).to(tl.float32)
    if VECTORS == 1:
        if HAS_WEIGHTS:
            weight = tl.load(W + row_offset(token, head, stride_wt, stride_wh), mask=some[:, None], other=0.0)
            total = tl.sum(keys * weight.to(tl.float32)[:, :, None], 1)
        else:
            total = tl.sum(keys, 1) / BLOCK
        out = OUT + row_offset(block, head, stride_ob, stride_oh)[:, None] + d[None, :]
        tl.store(out, total.to(OUT.dtype.element_ty), mask=inside[:, None])
    else:
        part: tl.constexpr = BLOCK // VECTORS
        keys = tl.reshape(keys, [B * VECTORS, part, D])
        if HAS_WEIGHTS:
            weight = tl.load(W + row_offset(token, head, stride_wt, stride_wh), mask=some[:, None], other=0.0)
            weight = tl.reshape(weight.to(tl.float32), [B * VECTORS, part])
            sums = tl.sum(weight, 1)[:, None]
            weight = tl.where(sums > 0, weight / tl.where(sums > 0, sums, 1.0), 1.0 / part)
            vectors = tl.sum(keys * weight[:, :, None], 1)
        else:
            vectors = tl.sum(keys, 1) / part
        vector = tl.arange(0, VECTORS)
        out = OUT + row_offset(block, head, stride_ob, stride_oh)[:, None, None]
        out = out + (vector * D)[None, :, None] + d[None, None, :]
        vectors = tl.reshape(vectors, [B, VECTORS, D]).to(OUT.dtype.element_ty)
        tl.store(out, vectors, mask=inside[:, None, None])
