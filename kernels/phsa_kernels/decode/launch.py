"""The decode kernels as torch.library operators: launches and fakes.

Every shape and grid follows from the arguments' shapes: nothing is read back from the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from phsa_kernels.decode import tiles
from phsa_kernels.decode.append import append_kernel
from phsa_kernels.decode.attend import attend_kernel, combine_kernel
from phsa_kernels.decode.score import choose_kernel, score_kernel

# A product of tensor cores has at least 16 rows.
_MIN_ROWS = 16
_COMBINED_SPLITS = 16  # at a time
# Padded to at least these, so that few kernels are compiled.
_MIN_SPLITS, _MIN_MERGED = 64, 128


class Method(NamedTuple):
    """The settings of a call; lengths in tokens."""

    topk: int
    init: int
    local: int
    block: int
    dense_len: int
    softmax: bool
    scale: float


@torch.library.custom_op(
    "phsa::append_keys",
    mutates_args=("k_cache", "v_cache", "pooled_cache", "open_sums", "open_marks"),
)
def append_keys(
    k: Tensor,
    v: Tensor,
    marks: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pooled_cache: Tensor,
    open_sums: Tensor,
    open_marks: Tensor,
    block_tokens: int,
    mean_weight_frac: float,
) -> None:
    """Append one token a sequence, in place."""
    batch, capacity, num_kv_heads, head_dim = k_cache.shape
    if batch == 0:
        return
    append_kernel[(batch * num_kv_heads,)](
        k, v, marks, lengths, k_cache, v_cache, pooled_cache, open_sums, open_marks, capacity,
        mean_weight_frac, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *pooled_cache.stride()[:3], HKV=num_kv_heads, BLOCK=block_tokens, D=head_dim, num_warps=1,
    )  # fmt: skip


@torch.library.custom_op("phsa::decode_attention", mutates_args=())
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pooled_cache: Tensor,
    lengths: Tensor,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    softmax: bool,
    dense_len_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out [B, Hq, D], lse [B, Hq], ids [B, Hkv, k])."""
    batch, capacity, num_kv_heads, _ = k_cache.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    ids = q.new_empty(batch, num_kv_heads, topk, dtype=torch.int32)
    if batch == 0:
        return out, lse, ids
    dense_len = min(dense_len_tokens, capacity)
    method = Method(topk, init_tokens, local_tokens, block_tokens, dense_len, softmax, scale)
    if topk and dense_len < capacity:
        best = choose(q, pooled_cache, lengths, method)
    else:  # nothing to choose: no chunk is ever looked at
        best = q.new_empty(0, 0, topk, dtype=torch.int64)
    attend(q, k_cache, v_cache, lengths, best, method, out, lse, ids)
    return out, lse, ids


@decode_attention.register_fake
def _(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, pooled_cache: Tensor, lengths: Tensor, topk: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.float32),
        q.new_empty(q.shape[0], k_cache.shape[2], topk, dtype=torch.int32),
    )


def _heads(q: Tensor, num_kv_heads: int) -> dict[str, int]:
    group = q.shape[1] // num_kv_heads
    return {"HKV": num_kv_heads, "GROUP": group, "HEADS": max(_MIN_ROWS, triton.next_power_of_2(group))}


def choose(q: Tensor, pooled: Tensor, lengths: Tensor, method: Method) -> Tensor:
    """Return the best k candidates of every chunk, int64 [pairs, chunks, k], as comparable keys."""
    tile = tiles.tiles_for(q.device, q.dtype)
    batch, num_blocks, num_kv_heads, head_dim = pooled.shape
    pairs, heads = batch * num_kv_heads, _heads(q, num_kv_heads)
    num_steps = triton.cdiv(num_blocks, tile.score_blocks)
    steps = tiles.steps_per_program(num_steps, pairs, q.device, tile)
    splits, split_blocks = triton.cdiv(num_steps, steps), steps * tile.score_blocks
    rows = heads["GROUP"] if method.softmax else 1
    scores = q.new_empty(pairs, rows, num_blocks, dtype=torch.float32)
    peak = q.new_empty(pairs, splits, rows, dtype=torch.float32)
    total = torch.empty_like(peak)
    score_kernel[(splits, pairs)](
        q, pooled, lengths, scores, peak, total, method.scale, num_blocks, split_blocks, method.dense_len,
        *q.stride()[:2], *pooled.stride()[:3], **heads, SOFTMAX=method.softmax, BLOCK=method.block,
        D=head_dim, BN=tile.score_blocks, num_warps=tile.score_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    chunks = triton.cdiv(num_blocks, tile.chunk_blocks)
    best = q.new_empty(pairs, chunks, method.topk, dtype=torch.int64)
    choose_kernel[(chunks, pairs)](
        lengths, scores, peak, total, best, num_blocks, splits, split_blocks, method.dense_len,
        HKV=num_kv_heads, GROUP=heads["GROUP"], SOFTMAX=method.softmax, INIT=method.init, LOCAL=method.local,
        BLOCK=method.block, TOPK=method.topk,
        SPLITS=max(_MIN_SPLITS, triton.next_power_of_2(splits)), CHUNK=tile.chunk_blocks, num_warps=4,
    )  # fmt: skip
    return best


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    best: Tensor,
    method: Method,
    out: Tensor,
    lse: Tensor,
    ids: Tensor,
) -> None:
    """Fill out, lse and ids."""
    tile = tiles.tiles_for(q.device, q.dtype)
    batch, _, num_kv_heads, head_dim = k_cache.shape
    pairs, heads = batch * num_kv_heads, _heads(q, num_kv_heads)
    sparse_slots = method.init + method.local + method.topk * method.block
    num_steps = triton.cdiv(max(sparse_slots, method.dense_len), tile.attend_keys)
    steps = tiles.steps_per_program(num_steps, pairs, q.device, tile)
    splits, split_keys = triton.cdiv(num_steps, steps), steps * tile.attend_keys
    part = q.new_empty(pairs, splits, heads["GROUP"], head_dim, dtype=torch.float32)
    peak = q.new_empty(pairs, splits, heads["GROUP"], dtype=torch.float32)
    total = torch.empty_like(peak)
    chunks = best.shape[1]
    attend_kernel[(splits, pairs)](
        q, k_cache, v_cache, lengths, best, ids, part, peak, total, method.scale,
        chunks, split_keys, method.dense_len, *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        **heads,
        INIT=method.init, LOCAL=method.local, BLOCK=method.block, TOPK=method.topk,
        SLOTS=triton.next_power_of_2(max(method.topk, 1)), CHUNK=tile.chunk_blocks,
        MERGED=max(_MIN_MERGED, triton.next_power_of_2(chunks * method.topk)), D=head_dim,
        BN=tile.attend_keys, num_warps=tile.attend_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    combine_kernel[(batch * q.shape[1],)](
        lengths, part, peak, total, out, lse, splits, triton.cdiv(sparse_slots, split_keys),
        split_keys, method.dense_len, HKV=num_kv_heads, GROUP=heads["GROUP"], D=head_dim,
        B=_COMBINED_SPLITS,
        num_warps=1 if splits <= _COMBINED_SPLITS else 4,
    )  # fmt: skip
