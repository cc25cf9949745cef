"""The ops of generation, public through `phsa_kernels.api`: one new token for each of B sequences.

Letters as in `api.py`, and: B sequences, C tokens of capacity in a cache, a multiple of m. Sequence b has
`lengths[b]` tokens so far, its newest included, and is one document. Lengths lie in device memory: every
shape and every launch follows from B and C alone, so that a step can be captured in a CUDA graph and replayed
at any length. Nothing past a sequence's length is ever read; it may be uninitialized.

Caches are indexed [B, C, Hkv, D] and may have any strides with D innermost; storing heads outermost keeps a
block's keys together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phsa_kernels.checks import check_heads, check_index, check_windows, implementation, require

GROUP_SCORES = ("softmax_sum", "raw_sum")


class DecodeOutput(NamedTuple):
    """What `decode_attention` returns: the output, its log-sum-exp and the chosen blocks."""

    out: Tensor
    lse: Tensor
    ids: Tensor


def _check_caches(
    k_cache: Tensor, v_cache: Tensor, pooled_cache: Tensor, lengths: Tensor, block_tokens: int
) -> None:
    require(block_tokens >= 1, f"block_tokens={block_tokens} must be at least 1")
    require(
        k_cache.dim() == 4 and k_cache.shape == v_cache.shape,
        f"k_cache and v_cache must be [B, C, Hkv, D] alike, got {tuple(k_cache.shape)}, "
        f"{tuple(v_cache.shape)}",
    )
    batch, capacity, num_kv_heads, head_dim = k_cache.shape
    require(
        capacity > 0 and capacity % block_tokens == 0,
        f"the caches hold {capacity} tokens: the capacity must be a positive multiple of "
        f"block_tokens={block_tokens}",
    )
    expected = (batch, capacity // block_tokens, num_kv_heads, head_dim)
    require(
        tuple(pooled_cache.shape) == expected,
        f"pooled_cache must be [B, C / m, Hkv, D] = {expected}, got {tuple(pooled_cache.shape)}",
    )
    require(
        k_cache.dtype == v_cache.dtype == pooled_cache.dtype,
        f"caches of one dtype are needed, got k {k_cache.dtype}, v {v_cache.dtype}, "
        f"pooled {pooled_cache.dtype}",
    )
    check_index("lengths", lengths, batch)


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
    *,
    block_tokens: int = 16,
    mean_weight_frac: float = 0.5,
    impl: str = "reference",
) -> None:
    """Write the newest token's key and value into the caches, in place; pool the block that it completes.

    The open block of a sequence has two running sums, of its keys and of its marked keys. With the block's
    last token they become the pooled key: `lambda * sum / m + (1 - lambda) * marked sum / c` with c > 0
    marked tokens, else `sum / m`: what `pool` gives with the method's weights, up to the order of a sum. A
    block's first token starts the sums anew, whatever they held.

    Args:
        k: keys [B, Hkv, D] of the new tokens, after RoPE, in the dtype of the caches.
        v: values [B, Hkv, D].
        marks: bool [B], whether the new token is in the block's second branch (punctuation).
        lengths: int32 [B], tokens of each sequence with the new one; 0 writes nothing. At most C: what lies
            beyond is not written (the reference refuses it).
        k_cache: [B, C, Hkv, D].
        v_cache: [B, C, Hkv, D].
        pooled_cache: [B, C / m, Hkv, D].
        open_sums: fp32 (fp64 for fp64 keys) [B, Hkv, 2, D], contiguous.
        open_marks: int32 [B, Hkv], marked tokens of the open block; one count a head, so that no two programs
            share one. Contiguous.
        block_tokens: m.
        mean_weight_frac: lambda.
        impl: 'reference' or 'triton'.

    Raises:
        ValueError: a shape, dtype or option that no implementation accepts.
        NotImplementedError: an option that the chosen implementation does not have.

    Deterministic. Source: method page, section 2.
    """
    _check_caches(k_cache, v_cache, pooled_cache, lengths, block_tokens)
    batch, _, num_kv_heads, head_dim = k_cache.shape
    row = (batch, num_kv_heads, head_dim)
    require(
        tuple(k.shape) == tuple(v.shape) == row and k.dtype == v.dtype == k_cache.dtype,
        f"k and v must be [B, Hkv, D] = {row} in {k_cache.dtype}, got {tuple(k.shape)} {k.dtype}, "
        f"{tuple(v.shape)} {v.dtype}",
    )
    require(
        tuple(marks.shape) == (batch,) and marks.dtype == torch.bool,
        f"marks must be bool [B] = [{batch}], got {tuple(marks.shape)} {marks.dtype}",
    )
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    require(
        tuple(open_sums.shape) == (batch, num_kv_heads, 2, head_dim)
        and open_sums.dtype == wide
        and open_sums.is_contiguous(),
        f"open_sums must be contiguous {wide} [B, Hkv, 2, D], got {tuple(open_sums.shape)} {open_sums.dtype}",
    )
    require(
        tuple(open_marks.shape) == (batch, num_kv_heads)
        and open_marks.dtype == torch.int32
        and open_marks.is_contiguous(),
        f"open_marks must be contiguous int32 [B, Hkv], got {tuple(open_marks.shape)} {open_marks.dtype}",
    )
    require(0 <= mean_weight_frac <= 1, f"mean_weight_frac={mean_weight_frac} must lie in 0 to 1")
    module = implementation(impl, "phsa_kernels.decode.reference", "phsa_kernels.decode.backend")
    module.append_keys(
        k,
        v,
        marks,
        lengths,
        k_cache,
        v_cache,
        pooled_cache,
        open_sums,
        open_marks,
        block_tokens=block_tokens,
        mean_weight_frac=mean_weight_frac,
    )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pooled_cache: Tensor,
    lengths: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int = 16,
    group_score: str = "softmax_sum",
    dense_len_tokens: int = 0,
    softmax_scale: float | None = None,
    impl: str = "reference",
) -> DecodeOutput:
    """Return attention of each sequence's newest token: what `phsa_attention` gives for its last query.

    out [B, Hq, D] in the dtype of q, lse fp32 [B, Hq], ids int32 [B, Hkv, k] as `select` returns them. The
    candidates, windows, scores and ties are those of `select` and `attend` for the query at position
    `lengths - 1`. A sequence of no token gives zeros, an lse of -infinity and ids of -1.

    Args:
        q: queries [B, Hq, D] after RoPE, in the dtype of the caches.
        k_cache: [B, C, Hkv, D]; the newest token's key is in it already (`append_keys`).
        v_cache: [B, C, Hkv, D].
        pooled_cache: [B, C / m, Hkv, D], pooled keys of the complete blocks.
        lengths: int32 [B], tokens of each sequence with the newest one, at most C.
        topk: k; 0 chooses nothing: init and local windows only.
        init_tokens: always-attended tokens at the start, a multiple of block_tokens, or 0.
        local_tokens: local window, a positive multiple of block_tokens.
        block_tokens: m.
        group_score: 'softmax_sum' or 'raw_sum'.
        dense_len_tokens: a sequence attends to all of its tokens while it has up to this many; its ids are
            then -1. 0 never.
        softmax_scale: default D ** -0.5.
        impl: 'reference' or 'triton'.

    Raises:
        ValueError: a shape, dtype or option that no implementation accepts.
        NotImplementedError: an option that the chosen implementation does not have.

    Deterministic. No gradient. Source: method page, section 3.
    """
    _check_caches(k_cache, v_cache, pooled_cache, lengths, block_tokens)
    check_heads(q, k_cache.shape[2], k_cache.shape[3])
    require(
        len(q) == len(k_cache) and q.dtype == k_cache.dtype,
        f"q must have one row a sequence in the caches' dtype, got {tuple(q.shape)} {q.dtype} for "
        f"{len(k_cache)} sequences in {k_cache.dtype}",
    )
    check_windows(block_tokens, init_tokens, local_tokens)
    require(topk >= 0, f"topk={topk} must not be negative")
    require(dense_len_tokens >= 0, f"dense_len_tokens={dense_len_tokens} must not be negative")
    require(
        group_score in GROUP_SCORES,
        f"group_score={group_score!r} is unknown; use one of {', '.join(GROUP_SCORES)}",
    )
    module = implementation(impl, "phsa_kernels.decode.reference", "phsa_kernels.decode.backend")
    return DecodeOutput(
        *module.decode_attention(
            q,
            k_cache,
            v_cache,
            pooled_cache,
            lengths,
            topk=topk,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            block_tokens=block_tokens,
            group_score=group_score,
            dense_len_tokens=dense_len_tokens,
            softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
        )
    )
