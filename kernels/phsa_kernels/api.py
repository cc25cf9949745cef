"""The one public door: ops with an explicit `impl=`, whose arguments are checked here and nowhere else.

The ops below are for whole documents. Those of generation, one token a sequence, come from `decode/door.py`.

Letters: T tokens of all documents in the call, Tq query tokens, Tk key tokens, Hq query heads, Hkv key-value
heads, R = Hq / Hkv, D head dim, m = block_tokens, N documents, NB = Tk // m rows of pooled blocks,
V vectors per block, k = topk.

Documents lie one after another along T; `cu_seqlens` holds their N + 1 boundaries. Empty documents are
allowed, so a caller pads `cu_seqlens` with repeats of Tk and no shape ever depends on data. Blocks restart at
every document. Only complete blocks (all m tokens inside the document) are pooled: they are the only ones
that may be scored. Document d owns the rows `cu_blocks[d]` up to `cu_blocks[d + 1]` with
`cu_blocks = cumsum(len // m)`; rows from `cu_blocks[N]` on are zero. Block ids are relative to the document:
block b of document d starts at key `cu_seqlens[d] + b * m`.

An implementation is used or refused: an unknown `impl`, a device or a shape that it does not serve raises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phsa_kernels.checks import IMPLS as IMPLS
from phsa_kernels.checks import check_heads as _check_heads
from phsa_kernels.checks import check_index as _check_index
from phsa_kernels.checks import check_windows as _check_windows
from phsa_kernels.checks import implementation as _implementation
from phsa_kernels.checks import require as _require
from phsa_kernels.decode.door import DecodeOutput as DecodeOutput
from phsa_kernels.decode.door import append_keys as append_keys
from phsa_kernels.decode.door import decode_attention as decode_attention

POOL_KINDS = ("mean", "moments", "minmax", "halves")
GROUP_SCORES = ("softmax_sum", "raw_sum", "per_head")
SCORES = ("dot", "cumulant", "minmax", "max_of_two")


class PHSAOutput(NamedTuple):
    """What `phsa_attention` returns: the output, its log-sum-exp and the chosen blocks."""

    out: Tensor
    lse: Tensor
    ids: Tensor


def block_boundaries(cu_seqlens: Tensor, block_tokens: int) -> Tensor:
    """Return `cu_blocks` int32 [N + 1]: first pooled row of each document (complete blocks only)."""
    num_blocks = (cu_seqlens[1:] - cu_seqlens[:-1]) // block_tokens
    return torch.nn.functional.pad(num_blocks.cumsum(0), (1, 0)).to(torch.int32)


def token_positions(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return (position in its document, document index), both int32 [num_tokens], of every token."""
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    doc = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[doc]).to(torch.int32), doc.to(torch.int32)


def pool(
    k: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor,
    *,
    block_tokens: int = 16,
    kind: str = "mean",
    impl: str = "reference",
) -> Tensor:
    """Return the pooled keys [NB, Hkv, V, D] of all complete blocks, in the dtype of `k`.

    Accumulated in fp32 (fp64 for fp64 keys) and rounded once. Differentiable in the reference; selection
    passes no gradient (method, section 3), so training never asks for one.

    Args:
        k: keys [Tk, Hkv, D], any float dtype, after RoPE.
        weights: fp32 [Tk] or [Tk, Hkv], the weight of each key in its block's sum (method, section 2), or
            None for 1/m.
        cu_seqlens: int32 [N + 1] document boundaries; repeats are empty documents.
        block_tokens: m, keys per block.
        kind: 'mean' (V = 1): the weighted sum of the block's keys. 'halves' (V = 2): the same of each half,
            with its weights made to sum to 1; the plain mean of a half whose weights are all zero.
        impl: 'reference' or 'triton'.

    Raises:
        ValueError: a shape, dtype or option that no implementation accepts.
        NotImplementedError: an option that the chosen implementation does not have.

    Deterministic. Source: paper section 3.2; method page section 2.
    """
    _require(k.dim() == 3, f"k must be [Tk, Hkv, D], got {tuple(k.shape)}")
    _require(kind in POOL_KINDS, f"kind={kind!r} is unknown; use one of {', '.join(POOL_KINDS)}")
    _require(block_tokens >= 1, f"block_tokens={block_tokens} must be at least 1")
    _require(
        kind != "halves" or block_tokens % 2 == 0,
        f"kind='halves' cuts blocks of block_tokens={block_tokens} in two: use an even block size",
    )
    _check_index("cu_seqlens", cu_seqlens)
    if weights is not None:
        _require(
            tuple(weights.shape) in {(k.shape[0],), (k.shape[0], k.shape[1])},
            f"weights must be [Tk] or [Tk, Hkv] for k {tuple(k.shape)}, got {tuple(weights.shape)}",
        )
    run = _implementation(impl).pool
    pooled: Tensor = run(k, weights, cu_seqlens, block_tokens=block_tokens, kind=kind)
    return pooled


def select(
    q: Tensor,
    pooled: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_blocks: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int = 16,
    group_score: str = "softmax_sum",
    score: str = "dot",
    softmax_scale: float | None = None,
    impl: str = "reference",
) -> Tensor:
    """Return the chosen blocks, int32 [Tq, Hsel, k]: ids relative to the document, ascending, padded with -1.

    Candidates of a query in block `cur` are the blocks after the init window and before the local window,
    `init_tokens / m <= b <= cur - local_tokens / m`; the best k by score, all of them if there are fewer.
    Equal scores go to the lower block. softmax_sum: per head, softmax over all blocks before `cur`
    (windows included), summed over the group's heads. raw_sum: dot products summed over the heads.
    Scores, softmax and comparisons are fp32 (fp64 for fp64 inputs). No gradient flows through.

    Args:
        q: queries [Tq, Hq, D] after RoPE.
        pooled: [NB, Hkv, V, D] as `pool` returns it; it may hold more documents than the queries use.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], document index of each query into `cu_blocks`.
        cu_blocks: int32 [N + 1], first pooled row of each document.
        topk: k >= 1.
        init_tokens: always-attended tokens at the start of the document, a multiple of block_tokens, or 0.
        local_tokens: local window, a positive multiple of block_tokens.
        block_tokens: m.
        group_score: 'softmax_sum' or 'raw_sum' (Hsel = Hkv).
        score: 'dot' (V = 1), or 'max_of_two' (V = 2): the larger of a query's products with both vectors.
        softmax_scale: scale of the dot products, default D ** -0.5.
        impl: 'reference' or 'triton'.

    Raises:
        ValueError: a shape, dtype or option that no implementation accepts.
        NotImplementedError: an option that the chosen implementation does not have.

    Deterministic. Source: method page section 3.
    """
    _require(pooled.dim() == 4, f"pooled must be [NB, Hkv, V, D], got {tuple(pooled.shape)}")
    _check_heads(q, pooled.shape[1], pooled.shape[3])
    _check_windows(block_tokens, init_tokens, local_tokens)
    _require(topk >= 1, f"topk={topk} must be at least 1")
    _require(
        group_score in GROUP_SCORES,
        f"group_score={group_score!r} is unknown; use one of {', '.join(GROUP_SCORES)}",
    )
    _require(score in SCORES, f"score={score!r} is unknown; use one of {', '.join(SCORES)}")
    vectors = 1 if score == "dot" else 2
    _require(
        pooled.shape[2] == vectors,
        f"score={score!r} is of {vectors} vectors a block, pooled has {pooled.shape[2]}",
    )
    _check_index("q_pos", q_pos, len(q))
    _check_index("q_doc", q_doc, len(q))
    _check_index("cu_blocks", cu_blocks)
    ids: Tensor = _implementation(impl).select(
        q,
        pooled,
        q_pos,
        q_doc,
        cu_blocks,
        topk=topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        block_tokens=block_tokens,
        group_score=group_score,
        score=score,
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
    )
    return ids


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    block_slot: Tensor | None = None,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int = 16,
    dense_len_tokens: int = 0,
    softmax_scale: float | None = None,
    impl: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Return (out [Tq, Hq, D] in the dtype of q, lse fp32 [Tq, Hq]) of causal attention over the chosen keys.

    A query attends to init, local and its chosen blocks, each token once, never past its own position, with
    ordinary softmax. Gradients flow to q, k and v. A token of a document of up to `dense_len_tokens`
    attends to the whole document before it.

    Args:
        q: queries [Tq, Hq, D] after RoPE.
        k: keys [Tk, Hkv, D] after RoPE.
        v: values [Tk, Hkv, D].
        ids: int32 [Tq, Hsel, kk], Hsel in {Hkv, Hq}: ids relative to the document, -1 for none; kk may be 0.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], document index of each query into `cu_seqlens`.
        cu_seqlens: int32 [N + 1] document boundaries in the natural order of the keys.
        block_slot: int32, where each block lies: counting all blocks of all documents in order, incomplete
            last blocks included, entry i is the slot whose keys are rows `slot * m` on of k and v.
            None: natural order. -1 marks a block that is not there: its keys and values read as zeros, and no
            query may choose it or have it in a window. Rows past the end of a document in its last slot, and
            rows of slots that are not named, are never read; their gradients are zero. The triton backward
            needs distinct slots and fails if one is named twice; the reference adds the gradients up.
        init_tokens: always-attended tokens at the start of the document, a multiple of block_tokens, or 0.
        local_tokens: local window, a positive multiple of block_tokens.
        block_tokens: m.
        dense_len_tokens: documents of up to this many tokens are attended densely; 0 never.
        softmax_scale: default D ** -0.5.
        impl: 'reference' or 'triton'.

    Raises:
        ValueError: a shape, dtype or option that no implementation accepts.
        NotImplementedError: an option that the chosen implementation does not have.

    Deterministic in the reference. Source: method page section 3, last paragraph.
    """
    _require(
        k.dim() == 3 and k.shape == v.shape,
        f"k and v must be [Tk, Hkv, D] alike, got {tuple(k.shape)}, {tuple(v.shape)}",
    )
    _check_heads(q, k.shape[1], k.shape[2])
    _check_windows(block_tokens, init_tokens, local_tokens)
    _require(
        ids.dim() == 3
        and ids.shape[0] == len(q)
        and ids.shape[1] in {k.shape[1], q.shape[1]}
        and ids.dtype == torch.int32,
        f"ids must be int32 [Tq, Hkv or Hq, k], got {tuple(ids.shape)} {ids.dtype}",
    )
    _require(dense_len_tokens >= 0, f"dense_len_tokens={dense_len_tokens} must not be negative")
    _check_index("q_pos", q_pos, len(q))
    _check_index("q_doc", q_doc, len(q))
    _check_index("cu_seqlens", cu_seqlens)
    if block_slot is not None:
        _check_index("block_slot", block_slot)
    result: tuple[Tensor, Tensor] = _implementation(impl).attend(
        q,
        k,
        v,
        ids,
        q_pos,
        q_doc,
        cu_seqlens,
        block_slot,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        block_tokens=block_tokens,
        dense_len_tokens=dense_len_tokens,
        softmax_scale=q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale,
    )
    return result


def phsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int = 16,
    group_score: str = "softmax_sum",
    kind: str = "mean",
    score: str = "dot",
    dense_len_tokens: int = 0,
    softmax_scale: float | None = None,
    q_pos: Tensor | None = None,
    q_doc: Tensor | None = None,
    impl: str = "reference",
) -> PHSAOutput:
    """Return (out, lse, ids) of pooling, selection and attention in one call: the door most users take.

    Without `q_pos` and `q_doc` the queries are all tokens of the documents, in order (Tq = Tk). With them,
    the queries may be any subset: a suffix at inference, or a context-parallel rank's own chunk.
    Arguments, errors and determinism as in `pool`, `select` and `attend`.
    """
    _require((q_pos is None) == (q_doc is None), "give both q_pos and q_doc, or neither")
    if q_pos is None or q_doc is None:
        _require(len(q) == len(k), f"{len(q)} queries and {len(k)} keys: give q_pos and q_doc")
        q_pos, q_doc = token_positions(cu_seqlens, len(k))
    pooled = pool(k.detach(), weights, cu_seqlens, block_tokens=block_tokens, kind=kind, impl=impl)
    ids = select(
        q.detach(),
        pooled,
        q_pos,
        q_doc,
        block_boundaries(cu_seqlens, block_tokens),
        topk=topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        block_tokens=block_tokens,
        group_score=group_score,
        score=score,
        softmax_scale=softmax_scale,
        impl=impl,
    )
    out, lse = attend(
        q,
        k,
        v,
        ids,
        q_pos,
        q_doc,
        cu_seqlens,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        block_tokens=block_tokens,
        dense_len_tokens=dense_len_tokens,
        softmax_scale=softmax_scale,
        impl=impl,
    )
    return PHSAOutput(out, lse, ids)
