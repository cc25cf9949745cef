"""Small pieces that several kernels share. Positions and offsets of tokens are int32, of elements int64."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

# Base-2 exponentials are one instruction on the GPU: kernels keep scores and normalizers in powers of two.
LOG2_E = tl.constexpr(1.4426950408889634)
# Finite, so that a tile in which a row sees no key computes exp2(0) and not exp2(-inf + inf).
MASKED = tl.constexpr(-1.0e30)


@triton.jit
def row_offset(row, head, stride_row, stride_head):
    """Return the int64 offset of (row, head): tokens * heads * dim passes 2**31 at long context."""
    return row.to(tl.int64) * stride_row + head * stride_head


@triton.jit
def load_rows(base, row, head, stride_row, stride_head, ok, D: tl.constexpr):
    """Load [rows, D] of one head, zeros where `ok` is false; `head` is a scalar or one per row."""
    d = tl.arange(0, D)
    offset = row_offset(row, head, stride_row, stride_head)
    return tl.load(base + offset[:, None] + d[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def product(a, b):
    """Return a @ b in fp32; fp32 operands are multiplied in full precision, not in tf32."""
    return tl.dot(a, b, input_precision="ieee")
