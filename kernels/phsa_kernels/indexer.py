"""A learned block indexer and its distillation from dense attention, in eager PyTorch.

It is the lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556) on blocks instead of tokens: a few small
heads, ReLU of dot products, a weighted sum over the heads, trained by the KL divergence from dense attention.
Each key-value head has an indexer of its own. Letters as in `api.py`; J index heads of E channels, candidates
as in `api.select`, block rows and `cu_blocks` as `api.pool` and `api.block_boundaries` give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phsa_kernels.reference import _best_blocks, _chunks_by_document, _lengths, _wide


class Index(NamedTuple):
    """What the indexer made of queries and blocks.

    Attributes:
        query: [Tq, Hkv, J, E].
        weight: [Tq, Hkv, J], of the index heads.
        key: [NB, Hkv, E], of all complete blocks.
    """

    query: Tensor
    weight: Tensor
    key: Tensor


def _scores(index: Index, q_doc: Tensor, cu_blocks: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield rows of queries, their document, and index scores [n, Hkv, blocks] of its blocks."""
    wide = _wide(index.query.dtype)
    first = cu_blocks.tolist()
    # Scaled to stay of one size whatever the number of heads and channels.
    scale = (index.query.shape[2] * index.query.shape[3]) ** -0.5
    for doc, rows in _chunks_by_document(q_doc):
        keys = index.key[first[doc] : first[doc + 1]].to(wide)
        dots = torch.einsum("ngje,bge->ngjb", index.query[rows].to(wide), keys).relu()
        yield rows, doc, (dots * index.weight[rows].to(wide)[..., None]).sum(2) * scale


@torch.no_grad()
def select_indexed(
    index: Index,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_blocks: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    impl: str = "reference",
) -> Tensor:
    """Return the blocks with the largest index scores, int32 [Tq, Hkv, k], as `api.select` does.

    Args:
        index: of the queries and of all blocks.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        cu_blocks: int32 [N + 1], first block row of each document.
        topk: k >= 1.
        init_tokens: as in `api.select`.
        local_tokens: as in `api.select`.
        block_tokens: m.
        impl: only 'reference'.

    Raises:
        NotImplementedError: another impl.

    Deterministic; ties go to the lower block.
    """
    if impl != "reference":
        raise NotImplementedError(f"the block indexer has impl='reference' only, not {impl!r}")
    m = block_tokens
    shape = (*index.query.shape[:2], topk)
    ids = torch.full(shape, -1, dtype=torch.int32, device=index.query.device)
    for rows, _, scores in _scores(index, q_doc, cu_blocks):
        current = q_pos[rows].long() // m
        ids[rows] = _best_blocks(scores, current, topk, init_tokens // m, local_tokens // m)
    return ids


def distillation_loss(
    index: Index,
    q: Tensor,
    k: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    cu_blocks: Tensor,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return the sum over queries and key-value heads of KL(p || softmax of the index scores), in nats.

    p is dense attention's probability of each candidate block, summed over the group's heads and divided by
    its sum over the candidates; the softmax is over the candidates too. A query with fewer than two
    candidates adds 0. Gradients flow to `index`, not to q and k.

    Args:
        index: of the queries and of all blocks.
        q: the attention's queries [Tq, Hq, D] after RoPE.
        k: its keys [Tk, Hkv, D] after RoPE, all documents.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        cu_seqlens: int32 [N + 1] document boundaries.
        cu_blocks: int32 [N + 1], first block row of each document.
        init_tokens: as in `api.select`.
        local_tokens: as in `api.select`.
        block_tokens: m.
        softmax_scale: of the dense attention, default D ** -0.5.
    """
    m, scale = block_tokens, q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    keys_of_doc = k.detach().split_with_sizes(_lengths(cu_seqlens, len(k)))
    # Without any choice it is still a function of the index, with a gradient of zero.
    total = sum((x.to(_wide(x.dtype)).sum() for x in index), start=torch.zeros((), device=q.device)) * 0.0
    for rows, doc, scores in _scores(index, q_doc, cu_blocks):
        position, num_blocks = q_pos[rows].long(), scores.shape[2]
        block = torch.arange(num_blocks, device=q.device)
        last = (position // m - local_tokens // m)[:, None]
        candidate = (block >= init_tokens // m) & (block <= last)  # [n, blocks]
        choosing = candidate.sum(1) > 1
        if not bool(choosing.any()):
            continue
        target = _block_mass(q[rows], keys_of_doc[doc], position, num_blocks, m, scale)[choosing]
        candidate, scores = candidate[choosing][:, None], scores[choosing]
        target = target * candidate
        target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        log_index = scores.masked_fill(~candidate, -math.inf).log_softmax(-1)
        log_index = log_index.masked_fill(~candidate, 0.0)  # its target is 0 there
        total = total + (torch.special.xlogy(target, target) - target * log_index).sum()
    return total


@torch.no_grad()
def _block_mass(q: Tensor, keys: Tensor, position: Tensor, num_blocks: int, m: int, scale: float) -> Tensor:
    """Return [n, Hkv, blocks]: dense attention's probability of complete blocks, summed over the group."""
    wide = _wide(q.dtype)
    queries = q.to(wide).view(len(q), keys.shape[1], -1, q.shape[2])
    dots = torch.einsum("ngrd,sgd->ngrs", queries, keys.to(wide)) * scale
    future = torch.arange(len(keys), device=q.device) > position[:, None]
    mass = dots.masked_fill(future[:, None, None], -math.inf).softmax(-1).sum(2)
    return mass[..., : num_blocks * m].reshape(*mass.shape[:2], num_blocks, m).sum(-1)


__all__ = ["Index", "distillation_loss", "select_indexed"]
