"""Keys that lie in slots: `block_slot` as one row of k and v per key in natural order.

Kernels count keys in natural order, as without slots; only where they read or write k, v, dk and dv does a
key become a row. KEY_ROWS None means natural order and compiles to the code without slots.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from phsa_kernels.primitives import load_all_rows, load_rows, load_tile


@triton.jit
def load_keys(K, V, KEY_ROWS, key, ok, head, stride_kt, stride_kh, stride_vt, stride_vh, D: tl.constexpr):
    """Load (k, v) [keys, D] of one head, zeros where `ok` is false or the key lies nowhere (row -1)."""
    if KEY_ROWS is not None:
        key = tl.load(KEY_ROWS + key, mask=ok, other=-1)
        ok = key >= 0
    k = load_rows(K, key, head, stride_kt, stride_kh, ok, D)
    v = load_rows(V, key, head, stride_vt, stride_vh, ok, D)
    return k, v


@triton.jit
def load_all_keys(K, V, KEY_ROWS, key, head, stride_kt, stride_kh, stride_vt, stride_vh, D: tl.constexpr):
    """Load (k, v) [keys, D] of one head, every key valid (though with slots it may lie nowhere: zeros)."""
    if KEY_ROWS is not None:
        key = tl.load(KEY_ROWS + key)
        k = load_rows(K, key, head, stride_kt, stride_kh, key >= 0, D)
        v = load_rows(V, key, head, stride_vt, stride_vh, key >= 0, D)
    else:
        k = load_all_rows(K, key, head, stride_kt, stride_kh, D)
        v = load_all_rows(V, key, head, stride_vt, stride_vh, D)
    return k, v


@triton.jit
def load_tile_of_keys(
    K, V, KEYS, VALUES, KEY_ROWS, first, head, stride_kt, stride_kh, stride_vt, stride_vh,
    BN: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load (k, v) [BN, D] of the keys from `first` on, every key valid; KEYS, VALUES: their tiles."""
    if KEY_ROWS is not None:
        key = first + tl.arange(0, BN)
        k, v = load_all_keys(K, V, KEY_ROWS, key, head, stride_kt, stride_kh, stride_vt, stride_vh, D)
    else:
        k = load_tile(KEYS, first, head, BN, D)
        v = load_tile(VALUES, first, head, BN, D)
    return k, v


def natural_keys(k: Tensor, block_slot: Tensor | None, block_tokens: int) -> int:
    """Return how many keys the natural order has at most: known without reading `cu_seqlens`."""
    return k.shape[0] if block_slot is None else len(block_slot) * block_tokens


def key_rows(cu_seqlens: Tensor, block_slot: Tensor, num_rows: int, block_tokens: int) -> Tensor:
    """Return the row in k of every key in natural order, int32 [len(block_slot) * m]; -1: it lies nowhere.

    Entries past the documents' last key are -1 too. Nothing is read back: what is wrong with the table is
    found on the device, where an index out of range would read memory that is not k's.
    """
    num_docs = len(cu_seqlens) - 1
    token = torch.arange(len(block_slot) * block_tokens, device=cu_seqlens.device, dtype=torch.int32)
    blocks = (cu_seqlens[1:] - cu_seqlens[:-1] + block_tokens - 1) // block_tokens
    first_block = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
    doc = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=num_docs - 1)
    position = token - cu_seqlens[doc]
    block = (first_block[doc] + position // block_tokens).clamp(max=len(block_slot) - 1)
    slot = block_slot[block]
    row = slot.long() * block_tokens + position % block_tokens
    row = torch.where((token < cu_seqlens[-1]) & (slot >= 0), row, -1)
    fits = (first_block[-1] <= len(block_slot)) & (row < num_rows).all()
    torch._assert_async(fits, "block_slot has fewer entries than blocks, or a slot whose rows are not in k")
    return row.to(torch.int32)


def assert_distinct(rows: Tensor) -> None:
    """Fail on the device if two keys share a row: their gradients would be written over each other."""
    ordered = torch.where(rows < 0, -1 - torch.arange(len(rows), device=rows.device), rows).sort().values
    torch._assert_async((ordered.diff() != 0).all(), "block_slot names a slot twice: it has no gradient")
