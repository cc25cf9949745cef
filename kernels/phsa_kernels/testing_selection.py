"""How far a selection may be from exact arithmetic, for tests; not needed to use the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_kernels import api
from phsa_kernels.testing import Shape

_UNIT = 2.0**-24  # of fp32
_APPROXIMATE = 2.0**-22  # error of the GPU's base-2 exponential (relative) and logarithm (absolute)
_CHUNK_QUERIES = 1024


@dataclass(frozen=True)
class SelectionComparison:
    """What a selection got wrong against fp64 scores of the same queries and pooled keys.

    A row is one query and one KV head. `excused_frac` is the share of rows whose blocks differ from the fp64
    answer; that is right only where the fp64 scores are closer than the error of fp32 scores.
    `wrong_rows` differ beyond that, name a block twice or out of order, one that is no candidate, or too few.
    """

    num_rows: int
    excused_frac: float
    wrong_rows: int

    @property
    def within(self) -> bool:
        """No wrong row, and at most one row in a hundred decided by rounding."""
        return self.wrong_rows == 0 and self.excused_frac <= 0.01


def score_bounds(q: Tensor, keys: Tensor, seen: Tensor, group_score: str) -> tuple[Tensor, Tensor]:
    """Return fp64 group scores [n, Hkv, blocks] and how far fp32 scores may be from them.

    Shapes: q [n, Hq, D], keys [blocks, Hkv, V, D], seen bool [n, blocks]. A sum of D products errs by at most
    D units of the sum of their magnitudes, doubled because tensor cores truncate; the softmax scale and the
    change of base add four roundings. The normalizer adds one exponential a block, the logarithm and its own
    roundings, and turns an absolute error of the exponent into a relative one of the probability.
    """
    n, num_heads, dim = q.shape
    scale = dim**-0.5
    grouped, wide = q.double().view(n, keys.shape[1], -1, dim), keys.double()
    products = torch.einsum("nhrd,bhvd->nhrbv", grouped, wide) * scale
    magnitude = torch.einsum("nhrd,bhvd->nhrbv", grouped.abs(), wide.abs()) * scale
    # The larger of two numbers is no farther from exact than the worse of them.
    error = (_UNIT * (2 * dim * magnitude + 4 * products.abs())).amax(-1)
    exponent = products.amax(-1)
    heads = grouped.shape[2]
    if group_score == "raw_sum":
        return exponent.sum(2), error.sum(2) + heads * _UNIT * exponent.abs().sum(2)
    hidden = ~seen[:, None, None]
    lse = exponent.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
    probability = (exponent - lse).exp().masked_fill(hidden, 0.0)
    worst = error.masked_fill(hidden, 0.0).amax(-1, keepdim=True)
    size = (exponent.abs() + lse.abs()).masked_fill(hidden, 0.0).amax(-1, keepdim=True)
    relative = 2 * worst + 4 * _UNIT * size + (len(keys) + 4) * _APPROXIMATE + heads * _UNIT
    # What underflows in fp32 is zero.
    return probability.sum(2), (probability * relative).sum(2) + heads * 2.0**-125


def compare_selection(shape: Shape, q: Tensor, pooled: Tensor, ids: Tensor) -> SelectionComparison:
    """Hold the ids [T, Hkv, k] to the fp64 scores of q [T, Hq, D] against pooled [blocks, Hkv, V, D]."""
    cu_seqlens = shape.cu_seqlens(q.device)
    positions, documents = api.token_positions(cu_seqlens, shape.num_tokens)
    boundaries = api.block_boundaries(cu_seqlens, shape.block_tokens).tolist()
    differ = wrong = 0
    for doc, length in enumerate(shape.lengths):
        keys = pooled[boundaries[doc] : boundaries[doc + 1]]
        start = sum(shape.lengths[:doc])
        for begin in range(start, start + length, _CHUNK_QUERIES):
            rows = slice(begin, min(begin + _CHUNK_QUERIES, start + length))
            current = positions[rows].long() // shape.block_tokens
            found = compare_rows(shape, q[rows], keys, current, ids[rows].long())
            differ, wrong = differ + found[0], wrong + found[1]
    num_rows = ids.shape[0] * ids.shape[1]
    return SelectionComparison(num_rows, differ / max(num_rows, 1), wrong)


def compare_rows(shape: Shape, q: Tensor, keys: Tensor, current: Tensor, ids: Tensor) -> tuple[int, int]:
    """Return how many rows differ from the fp64 answer, and how many of all are wrong."""
    if len(keys) == 0:
        malformed = (ids != -1).flatten(1).any(-1)
        return int(malformed.sum()), int(malformed.sum())
    block = torch.arange(len(keys), device=q.device)
    seen = block < current[:, None]
    score, bound = score_bounds(q, keys, seen, shape.group_score)
    first, local = shape.init_tokens // shape.block_tokens, shape.local_tokens // shape.block_tokens
    candidate = ((block >= first) & (block <= (current - local)[:, None]))[:, None].expand_as(score)
    asked = candidate.sum(-1).clamp(max=shape.topk)
    # A column past the last block takes the empty slots.
    chosen = torch.zeros(*score.shape[:2], len(keys) + 1, device=q.device, dtype=torch.int64)
    valid = (ids >= 0) & (ids < len(keys))
    chosen.scatter_add_(2, torch.where(valid, ids, len(keys)), torch.ones_like(ids))
    chosen = chosen[..., :-1]
    ranked = torch.where(ids >= 0, ids, len(keys) + torch.arange(shape.topk, device=q.device))
    malformed = (
        (chosen > 1).any(-1)
        | ((chosen > 0) & ~candidate).any(-1)
        | (chosen.sum(-1) != asked)
        | (ids >= len(keys)).any(-1)
        | (ranked.diff(dim=-1) <= 0).any(-1)
    )
    taken, left = (chosen > 0) & candidate, (chosen == 0) & candidate
    lowest_taken = (score + bound).masked_fill(~taken, torch.inf)
    highest_left = (score - bound).masked_fill(~left, -torch.inf)
    none = score.new_full((*score.shape[:2], 1), torch.inf)
    beyond = torch.cat([lowest_taken, none], -1).amin(-1) < torch.cat([highest_left, -none], -1).amax(-1)
    order = score.masked_fill(~candidate, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(2, order, block.expand_as(order))
    exact = (rank < asked[..., None]) & candidate
    return int((exact != taken).any(-1).sum()), int((malformed | beyond).sum())
