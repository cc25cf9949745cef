"""The specification: PHSA in eager PyTorch, any float dtype, any device, with autograd.

Written to be read beside the method page; speed comes second. Letters as in `api.py`. Scores and softmax are
computed in fp32, or in fp64 when the inputs are fp64. Work is done document by document and in chunks of
queries, so memory is [heads, chunk, document length], never more.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from phsa_kernels.api import token_positions
from phsa_kernels.checks import VECTORS

_CHUNK_QUERIES = 128


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _lengths(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Return the documents' lengths, which must cover the tokens (an eager check: it reads the device)."""
    if int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, k has {num_tokens} tokens")
    return (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()


def pool(k: Tensor, weights: Tensor | None, cu_seqlens: Tensor, *, block_tokens: int, kind: str) -> Tensor:
    """Return the pooled keys [Tk // m, Hkv, V, D]; see `phsa_kernels.api.pool`."""
    if kind not in VECTORS:
        raise NotImplementedError(f"kind={kind!r}: impl='reference' has the kinds {', '.join(VECTORS)}")
    vectors = VECTORS[kind]
    num_tokens, num_heads, head_dim = k.shape
    m, wide = block_tokens, _wide(k.dtype)
    _lengths(cu_seqlens, num_tokens)  # for its check
    position, doc = token_positions(cu_seqlens, num_tokens)
    complete = (cu_seqlens[1:] - cu_seqlens[:-1]) // m
    first_row = torch.nn.functional.pad(complete.cumsum(0), (1, 0))
    block = position // m
    in_complete = block < complete[doc]
    # Tokens of incomplete blocks go to one row past the end, which is dropped.
    row = torch.where(in_complete, first_row[doc] + block, num_tokens // m).long()
    row = row * vectors + position % m // (m // vectors)
    num_rows = (num_tokens // m + 1) * vectors
    if weights is None:
        weighted = k.to(wide) / (m // vectors)
    else:
        w = weights.to(wide).view(num_tokens, -1, 1)
        if vectors > 1:
            total = w.new_zeros(num_rows, *w.shape[1:]).index_add(0, row, w)[row]
            # A half may be without any weight.
            w = torch.where(total > 0, w / total.where(total > 0, 1.0), vectors / m)
        weighted = k.to(wide) * w
    pooled = weighted.new_zeros(num_rows, num_heads, head_dim).index_add(0, row, weighted)
    return pooled.view(-1, vectors, num_heads, head_dim)[:-1].transpose(1, 2).contiguous().to(k.dtype)


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
    if score not in ("dot", "max_of_two") or group_score == "per_head":
        raise NotImplementedError(
            f"score={score!r}, group_score={group_score!r}: impl='reference' has score='dot' and "
            "'max_of_two' with group_score='softmax_sum' or 'raw_sum'"
        )
    num_kv_heads = pooled.shape[1]
    ids = torch.full((len(q), num_kv_heads, topk), -1, dtype=torch.int32, device=q.device)
    for doc, rows in _chunks_by_document(q_doc):
        keys = pooled[int(cu_blocks[doc]) : int(cu_blocks[doc + 1])]
        current = q_pos[rows].long() // block_tokens
        scores = _block_scores(q[rows], keys, current, group_score, softmax_scale)
        ids[rows] = _best_blocks(
            scores, current, topk, init_tokens // block_tokens, local_tokens // block_tokens
        )
    return ids


def _block_scores(q: Tensor, keys: Tensor, current: Tensor, group_score: str, scale: float) -> Tensor:
    """Return group scores [n, Hkv, blocks] of n queries against one document's pooled [blocks, Hkv, V, D]."""
    wide = _wide(q.dtype)
    n, num_heads, head_dim = q.shape
    grouped = q.to(wide).view(n, keys.shape[1], -1, head_dim)
    by_vector = [torch.einsum("nhrd,bhd->nhrb", grouped, x) for x in keys.to(wide).unbind(2)]
    dots = functools.reduce(torch.maximum, by_vector) * scale
    if group_score == "raw_sum":
        return dots.sum(2)
    block = torch.arange(len(keys), device=q.device)
    before_current = (block < current[:, None])[:, None, None]
    # A query in block 0 has no block before it: its row is all -inf and softmax gives NaN, here 0.
    return dots.masked_fill(~before_current, -math.inf).softmax(-1).nan_to_num(0.0).sum(2)


def _best_blocks(scores: Tensor, current: Tensor, topk: int, num_init: int, num_local: int) -> Tensor:
    """Return the best candidates int32 [n, Hkv, k], ascending, -1 at the end; ties go to the lower block."""
    num_blocks = scores.shape[2]
    block = torch.arange(num_blocks, device=scores.device)
    candidate = (block >= num_init) & (block <= (current - num_local)[:, None])[:, None]  # [n, 1, blocks]
    scores = scores.masked_fill(~candidate, -math.inf)
    # `topk` promises no order among equals, so it only gives the k-th best score: all above it are chosen,
    # and at it the lowest blocks. A softmax that underflows to 0 is above -inf: still a candidate.
    width = min(topk, num_blocks)
    kth = scores.topk(width, dim=-1).values[..., -1:] if width else scores
    above, equal = scores > kth, scores == kth
    room = width - above.sum(-1, keepdim=True)
    chosen = (above | (equal & (equal.cumsum(-1) <= room))) & candidate
    ids = torch.where(chosen, block, num_blocks).topk(width, dim=-1, largest=False).values
    ids = torch.where(ids == num_blocks, -1, ids).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, topk - width), value=-1)


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
    """Return (out, lse) over init, local and the chosen blocks; see `phsa_kernels.api.attend`."""
    if block_slot is not None:
        k, v = (_natural_order(x, cu_seqlens, block_slot, block_tokens) for x in (k, v))
    # One split per tensor and not a slice per chunk: its backward is one concatenation.
    lengths = _lengths(cu_seqlens, len(k))
    keys_of_doc, values_of_doc = k.split_with_sizes(lengths), v.split_with_sizes(lengths)
    rows_of_all, outs, lses = [], [], []
    for doc, rows in _chunks_by_document(q_doc):
        num_keys = min(lengths[doc], int(q_pos[rows].max()) + 1)
        allowed = _allowed_keys(
            ids[rows],
            q_pos[rows].long(),
            num_keys,
            num_init=init_tokens // block_tokens,
            num_local=local_tokens // block_tokens,
            block_tokens=block_tokens,
            dense=lengths[doc] <= dense_len_tokens,
        )
        keys, values = keys_of_doc[doc][:num_keys], values_of_doc[doc][:num_keys]
        out, lse = _masked_attention(q[rows], keys, values, allowed, softmax_scale)
        rows_of_all.append(rows)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)
    undo = torch.cat(rows_of_all).argsort()
    return torch.cat(outs)[undo].to(q.dtype), torch.cat(lses)[undo].float()


def _chunks_by_document(q_doc: Tensor, num_queries: int = _CHUNK_QUERIES) -> list[tuple[int, Tensor]]:
    """Return documents with row indices of their queries, in chunks, covering every row once.

    The device is waited for once, not for each document.
    """
    order = q_doc.argsort(stable=True)
    chunks = []
    for doc, rows in enumerate(order.split_with_sizes(q_doc.bincount().tolist())):
        chunks += [(doc, rows[i : i + num_queries]) for i in range(0, len(rows), num_queries)]
    return chunks


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
    """Return bool [Hsel, n, num_keys]: which of one document's first keys each of n queries attends to."""
    key = torch.arange(num_keys, device=ids.device)
    causal = key <= position[:, None]  # [n, num_keys]
    if dense:
        return causal.expand(ids.shape[1], -1, -1)
    num_blocks = -(-num_keys // block_tokens)
    block = torch.arange(num_blocks, device=ids.device)
    current = (position // block_tokens)[:, None]
    window = (block < num_init) | (block > current - num_local)  # [n, num_blocks]
    # One column past the end takes the -1 of "no block".
    by_head = torch.where(ids < 0, num_blocks, ids.long()).transpose(0, 1)  # [Hsel, n, k]
    chosen = torch.zeros(*by_head.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    chosen.scatter_(2, by_head, True)
    attended = (window | chosen[..., :-1]).repeat_interleave(block_tokens, dim=-1)[..., :num_keys]
    return attended & causal


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (out [n, Hq, D], lse [n, Hq]) of softmax attention of n queries over the allowed keys."""
    wide = _wide(q.dtype)
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    grouped = (q.to(wide) * scale).view(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = (x.to(wide).transpose(0, 1) for x in (k, v))  # [Hkv, keys, D]
    # Heads of a group are rows of one product: batches stay Hkv, and keys are read once.
    scores = torch.bmm(grouped.flatten(1, 2), keys.mT).view(num_kv_heads, group, n, -1)
    mask = allowed.view(num_kv_heads, -1, *allowed.shape[1:])  # [Hkv, 1 or R, n, keys]
    scores = scores.masked_fill(~mask, -math.inf)  # [Hkv, R, n, keys]
    out = torch.bmm(scores.softmax(-1).flatten(1, 2), values).view(num_kv_heads, group, n, head_dim)
    lse = scores.logsumexp(-1)
    return out.permute(2, 0, 1, 3).reshape(n, num_heads, head_dim), lse.permute(2, 0, 1).reshape(n, -1)


def _natural_order(x: Tensor, cu_seqlens: Tensor, block_slot: Tensor, block_tokens: int) -> Tensor:
    """Return keys or values in document order, taken out of the slots that hold their blocks."""
    num_tokens = int(cu_seqlens[-1])
    position, doc = token_positions(cu_seqlens, num_tokens)
    blocks = -((cu_seqlens[:-1] - cu_seqlens[1:]) // block_tokens)
    first_block = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
    slot = block_slot[first_block[doc] + position // block_tokens].long()
    rows = x[slot.clamp(min=0) * block_tokens + position.long() % block_tokens]
    return torch.where((slot >= 0)[:, None, None], rows, 0.0)
