"""The specification: PHSA in eager PyTorch, any float dtype, any device, with autograd.

Written to be read beside the method page; speed comes second. Letters as in `api.py`. Scores and softmax are
computed in fp32, or in fp64 when the inputs are fp64. Work is done document by document and in chunks of
queries, so memory is [heads, chunk, document length], never more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phsa_kernels.api import token_positions

_CHUNK_QUERIES = 1024


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(
    k: Tensor, weights: Tensor | None, cu_seqlens: Tensor, *, block_tokens: int, kind: str
) -> Tensor:
    """Return the pooled keys [Tk // m, Hkv, 1, D]; see `phsa_kernels.api.pool`."""
    if kind != "mean":
        raise NotImplementedError(f"kind={kind!r}: impl='reference' has kind='mean'")
    num_tokens, num_heads, head_dim = k.shape
    m, wide = block_tokens, _wide(k.dtype)
    position, doc = token_positions(cu_seqlens, num_tokens)
    complete = (cu_seqlens[1:] - cu_seqlens[:-1]) // m
    first_row = torch.nn.functional.pad(complete.cumsum(0), (1, 0))
    block = position // m
    in_complete = block < complete[doc]
    # Tokens of incomplete blocks go to one row past the end, which is dropped.
    row = torch.where(in_complete, first_row[doc] + block, num_tokens // m).long()
    if weights is None:
        weighted = k.to(wide) / m
    else:
        weighted = k.to(wide) * weights.to(wide).view(num_tokens, -1, 1)
    pooled = weighted.new_zeros(num_tokens // m + 1, num_heads, head_dim)
    return pooled.index_add(0, row, weighted)[:-1].unsqueeze(2).to(k.dtype)


@torch.no_grad()
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
    block_tokens: int,
    group_score: str,
    score: str,
    softmax_scale: float,
) -> Tensor:
    """Return the chosen blocks int32 [Tq, Hkv, k]; see `phsa_kernels.api.select`."""
    if score != "dot" or group_score == "per_head" or pooled.shape[2] != 1:
        raise NotImplementedError(
            f"score={score!r}, group_score={group_score!r}, V={pooled.shape[2]}: impl='reference' has "
            "score='dot' with group_score='softmax_sum' or 'raw_sum' and V=1"
        )
    num_kv_heads = pooled.shape[1]
    ids = torch.full((len(q), num_kv_heads, topk), -1, dtype=torch.int32, device=q.device)
    for rows in _chunks_by_document(q_doc):
        doc = int(q_doc[rows[0]])
        keys = pooled[int(cu_blocks[doc]) : int(cu_blocks[doc + 1]), :, 0]
        current = q_pos[rows].long() // block_tokens
        scores = _block_scores(q[rows], keys, current, group_score, softmax_scale)
        ids[rows] = _best_blocks(
            scores, current, topk, init_tokens // block_tokens, local_tokens // block_tokens
        )
    return ids


def _block_scores(q: Tensor, keys: Tensor, current: Tensor, group_score: str, scale: float) -> Tensor:
    """Return group scores [n, Hkv, blocks] of n queries against one document's pooled keys [blocks, Hkv, D]."""
    wide = _wide(q.dtype)
    n, num_heads, head_dim = q.shape
    grouped = q.to(wide).view(n, keys.shape[1], -1, head_dim)
    dots = torch.einsum("nhrd,bhd->nhrb", grouped, keys.to(wide)) * scale
    if group_score == "raw_sum":
        return dots.sum(2)
    block = torch.arange(len(keys), device=q.device)
    before_current = (block < current[:, None])[:, None, None]
    # A query in block 0 has no block before it: its row is all -inf and softmax gives NaN, here 0.
    return dots.masked_fill(~before_current, -math.inf).softmax(-1).nan_to_num(0.0).sum(2)


def _best_blocks(scores: Tensor, current: Tensor, topk: int, num_init: int, num_local: int) -> Tensor:
    """Return the best candidates int32 [n, Hkv, k], ascending, -1 at the end; ties go to the lower block."""
    n, num_heads, num_blocks = scores.shape
    block = torch.arange(num_blocks, device=scores.device)
    candidate = (block >= num_init) & (block <= (current - num_local)[:, None])  # [n, blocks]
    # A stable sort of scores with non-candidates last keeps lower blocks first among equals. Candidates whose
    # softmax underflows to 0 still count as candidates, hence the second key.
    scores = scores.masked_fill(~candidate[:, None], -math.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    chosen = torch.where(candidate[:, None].expand_as(scores).gather(2, order), order, num_blocks)
    chosen = chosen.sort(dim=-1).values
    chosen = torch.where(chosen == num_blocks, -1, chosen).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, topk - chosen.shape[2]), value=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    block_slot: Tensor | None,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    dense_len_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of attention over init, local and the chosen blocks; see `phsa_kernels.api.attend`."""
    if block_slot is not None:
        k, v = (_natural_order(x, cu_seqlens, block_slot, block_tokens) for x in (k, v))
    rows_of_all, outs, lses = [], [], []
    for rows in _chunks_by_document(q_doc):
        doc = int(q_doc[rows[0]])
        start, end = int(cu_seqlens[doc]), int(cu_seqlens[doc + 1])
        end = min(end, start + int(q_pos[rows].max()) + 1)
        allowed = _allowed_keys(
            ids[rows],
            q_pos[rows].long(),
            end - start,
            num_init=init_tokens // block_tokens,
            num_local=local_tokens // block_tokens,
            block_tokens=block_tokens,
            dense=int(cu_seqlens[doc + 1]) - start <= dense_len_tokens,
        )
        out, lse = _masked_attention(q[rows], k[start:end], v[start:end], allowed, softmax_scale)
        rows_of_all.append(rows)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    undo = torch.cat(rows_of_all).argsort()
    return torch.cat(outs)[undo].to(q.dtype), torch.cat(lses)[undo].float()


def _chunks_by_document(q_doc: Tensor) -> list[Tensor]:
    """Return row indices of the queries, grouped by document and split into chunks, covering every row once."""
    order = q_doc.argsort(stable=True)
    _, counts = q_doc[order].unique_consecutive(return_counts=True)
    return [chunk for rows in order.split(counts.tolist()) for chunk in rows.split(_CHUNK_QUERIES)]


def _allowed_keys(
    ids: Tensor,
    position: Tensor,
    num_keys: int,
    *,
    num_init: int,
    num_local: int,
    block_tokens: int,
    dense: bool,
) -> Tensor:
    """Return bool [n, Hsel, num_keys]: which of one document's first keys each of n queries attends to."""
    key = torch.arange(num_keys, device=ids.device)
    causal = key <= position[:, None]  # [n, num_keys]
    if dense:
        return causal[:, None].expand(-1, ids.shape[1], -1)
    num_blocks = -(-num_keys // block_tokens)
    chosen = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    slot = torch.where(ids < 0, num_blocks, ids.long())
    chosen.scatter_(2, slot, True)
    block = key // block_tokens
    current = (position // block_tokens)[:, None]
    window = (block < num_init) | (block > current - num_local)
    return (window[:, None] | chosen[:, :, block]) & causal[:, None]


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [n, Hq, D], lse [n, Hq]) of softmax attention of n queries over the allowed keys."""
    wide = _wide(q.dtype)
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    grouped = q.to(wide).view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [Hkv, R, n, D]
    keys, values = (x.to(wide).permute(1, 2, 0) for x in (k, v))  # [Hkv, D, keys]
    scores = torch.matmul(grouped, keys.unsqueeze(1)) * scale  # [Hkv, R, n, keys]
    mask = allowed.permute(1, 0, 2)  # [Hsel, n, keys]
    mask = mask.unsqueeze(1) if allowed.shape[1] == num_kv_heads else mask.unflatten(0, (-1, group))
    scores = scores.masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    probs = (scores - lse.unsqueeze(-1)).exp()
    out = torch.matmul(probs, values.unsqueeze(1).transpose(-1, -2))  # [Hkv, R, n, D]
    return out.permute(2, 0, 1, 3).reshape(n, num_heads, head_dim), lse.permute(2, 0, 1).reshape(n, -1)


def _natural_order(x: Tensor, cu_seqlens: Tensor, block_slot: Tensor, block_tokens: int) -> Tensor:
    """Return keys or values in document order, taken out of the slots that hold their blocks."""
    num_tokens = int(cu_seqlens[-1])
    position, doc = token_positions(cu_seqlens, num_tokens)
    blocks = -((cu_seqlens[:-1] - cu_seqlens[1:]) // block_tokens)
    first_block = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
    slot = block_slot[first_block[doc] + position // block_tokens].long()
    return x[slot * block_tokens + position.long() % block_tokens]
