"""A learned block indexer and its distillation from dense attention, in eager PyTorch.

It is the lightning indexer of DeepSeek-V3.2 (arXiv 2512.02556) on blocks instead of tokens: a few small
heads, ReLU of dot products, a weighted sum over the heads, trained by the KL divergence from dense attention.
Each key-value head has an indexer of its own. Its inputs are the layer's queries and block means of keys,
without a gradient to them: the indexer learns from its own loss, and nothing else does. Letters as in
`api.py`; J index heads of E channels, candidates as in `api.select`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from phsa_kernels.reference import _best_blocks, _chunks_by_document, _lengths, _wide, pool


class IndexWeights(NamedTuple):
    """The weights of the indexers of all key-value heads.

    Attributes:
        query: [Hkv, R * D, J * E], from a group's queries to index queries.
        key: [Hkv, D, E], from a block's mean key to its index key.
        head: [Hkv, R * D, J], from a group's queries to the weights of the index heads.
    """

    query: Tensor
    key: Tensor
    head: Tensor


class _Document(NamedTuple):
    """Queries of a document: their rows, positions and index scores [n, Hkv, blocks], and its keys."""

    rows: Tensor
    position: Tensor
    scores: Tensor
    keys: Tensor


def _documents(
    q: Tensor, k: Tensor, weights: IndexWeights, q_pos: Tensor, q_doc: Tensor, cu_seqlens: Tensor, m: int
) -> list[_Document]:
    wide, num_kv_heads = _wide(q.dtype), k.shape[1]
    of_query, of_key, of_head = (w.to(wide) for w in weights)
    lengths = _lengths(cu_seqlens, len(k))
    counts = [length // m for length in lengths]
    means = pool(k, None, cu_seqlens, block_tokens=m, kind="mean")[: sum(counts), :, 0].to(wide)
    index_keys = torch.einsum("bgd,gde->bge", means, of_key).split_with_sizes(counts)
    keys_of_doc = k.split_with_sizes(lengths)
    found = []
    for rows in _chunks_by_document(q_doc):
        doc = int(q_doc[rows[0]])
        group = q[rows].to(wide).reshape(len(rows), num_kv_heads, -1)  # [n, Hkv, R * D]
        index_queries = torch.einsum("ngx,gxy->ngy", group, of_query).view(
            len(rows), num_kv_heads, of_head.shape[2], -1
        )
        head_weights = torch.einsum("ngx,gxj->ngj", group, of_head)
        dots = torch.einsum("ngje,bge->ngjb", index_queries, index_keys[doc]).relu()
        # Scaled to stay of one size whatever the number of heads and channels.
        scale = (index_queries.shape[2] * index_queries.shape[3]) ** -0.5
        scores = (dots * head_weights[..., None]).sum(2) * scale
        found.append(_Document(rows, q_pos[rows].long(), scores, keys_of_doc[doc]))
    return found


@torch.no_grad()
def select_indexed(
    q: Tensor,
    k: Tensor,
    weights: IndexWeights,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    impl: str = "reference",
) -> Tensor:
    """Return the blocks with the largest index scores, int32 [Tq, Hkv, k], as `api.select` does.

    Args:
        q: queries [Tq, Hq, D] after RoPE.
        k: keys [Tk, Hkv, D] after RoPE, all documents.
        weights: of the indexers.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        cu_seqlens: int32 [N + 1] document boundaries.
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
    ids = torch.full((len(q), k.shape[1], topk), -1, dtype=torch.int32, device=q.device)
    for rows, position, scores, _ in _documents(q, k, weights, q_pos, q_doc, cu_seqlens, m):
        ids[rows] = _best_blocks(scores, position // m, topk, init_tokens // m, local_tokens // m)
    return ids


def distillation_loss(
    q: Tensor,
    k: Tensor,
    weights: IndexWeights,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """Return the sum over queries and key-value heads of KL(p || softmax of the index scores), in nats.

    p is dense attention's probability of each candidate block, summed over the group's heads and divided by
    its sum over the candidates; the softmax is over the candidates too. A query with fewer than two
    candidates adds 0. Gradients flow to `weights` alone.

    Arguments as in `select_indexed`; `softmax_scale` is that of the dense attention, default D ** -0.5.
    """
    q, k = q.detach(), k.detach()
    m, scale = block_tokens, q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    total = sum((w.sum() for w in weights), start=q.new_zeros((), dtype=_wide(q.dtype))) * 0.0
    for rows, position, scores, keys in _documents(q, k, weights, q_pos, q_doc, cu_seqlens, m):
        num_blocks = scores.shape[2]
        block = torch.arange(num_blocks, device=q.device)
        last = (position // m - local_tokens // m)[:, None]
        candidate = (block >= init_tokens // m) & (block <= last)  # [n, blocks]
        choosing = candidate.sum(1) > 1
        if not bool(choosing.any()):
            continue
        target = _block_mass(q[rows], keys, position, num_blocks, m, scale)[choosing]
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


__all__ = ["IndexWeights", "distillation_loss", "select_indexed"]
