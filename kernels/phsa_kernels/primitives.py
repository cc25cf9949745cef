"""Small pieces that several kernels share. Positions and offsets of tokens are int32, of elements int64."""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_COPY_ALIGNMENT_BYTES = 16


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a descriptor of x [tokens, heads, D], aligned as `aligned` makes it, read by `load_tile`.

    The GPU's copy engine reads a tile of consecutive rows by it: no thread computes an address.
    """
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, 1, x.shape[2]])


def aligned(x: Tensor) -> Tensor:
    """Return x [tokens, heads, D], or a contiguous copy if the copy engine cannot read its rows."""
    step = _COPY_ALIGNMENT_BYTES // x.element_size()
    if (
        x.stride(2) == 1
        and x.data_ptr() % _COPY_ALIGNMENT_BYTES == 0
        and x.stride(0) % step == x.stride(1) % step == 0
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


# Base-2 exponentials are one instruction on the GPU: kernels keep scores and normalizers in powers of two.
LOG2_E = tl.constexpr(1.4426950408889634)
# Where a running maximum begins. Finite, so that a row that has seen no key yet computes exp2(-inf) = 0 for
# its masked scores and not exp2(-inf + inf).
LOWEST = tl.constexpr(-1.0e30)


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
def load_all_rows(base, row, head, stride_row, stride_head, D: tl.constexpr):
    """Load [rows, D] of one head, every row valid."""
    offset = row_offset(row, head, stride_row, stride_head)
    return tl.load(base + offset[:, None] + tl.arange(0, D)[None, :])


@triton.jit
def load_tile(descriptor, row, head, ROWS: tl.constexpr, D: tl.constexpr):
    """Load [ROWS, D] of one head from row on, zeros past the end of the tensor."""
    return tl.reshape(descriptor.load([row, head, 0]), [ROWS, D])


@triton.jit
def product(a, b):
    """Return a @ b in fp32; fp32 operands are multiplied in full precision, not in tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def block_products(q, POOLED, top, kv_head, VECTORS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr):
    """Return the products [rows of q, ROWS] with the pooled keys from `top` on: of two vectors the larger."""
    dot = product(q, tl.trans(load_tile(POOLED, top, kv_head * VECTORS, ROWS, D)))
    if VECTORS == 2:
        second = product(q, tl.trans(load_tile(POOLED, top, kv_head * VECTORS + 1, ROWS, D)))
        dot = tl.maximum(dot, second)
    return dot


@triton.jit
def count_bits(x):
    """Return the number of set bits of every int32 as int32."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def first_above(SORTED, count, steps, x, STRICT: tl.constexpr):
    """Return how many of SORTED[:count] are < x (<= x if STRICT), for every x; 2**steps > count."""
    low = tl.zeros_like(x)
    high = low + count
    for _ in range(steps):
        middle = low + (high - low) // 2
        value = tl.load(SORTED + middle, mask=low < high, other=0)
        below = value <= x if STRICT else value < x
        inside = low < high
        low = tl.where(inside & below, middle + 1, low)
        high = tl.where(inside & (below == 0), middle, high)
    return low
