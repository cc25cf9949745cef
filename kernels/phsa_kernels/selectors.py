"""Other block scores than PHSA's, in eager PyTorch: pooled vectors, scores and the chosen blocks.

None of them has parameters, and none passes a gradient: all end in the same `attend`. Letters as in `api.py`;
`w` are the pooling weights of a block's keys (1/m without punctuation), `s` a score before the group's heads
share it. Scores are fp32, or fp64 for fp64 inputs. Work is done document by document, in chunks of queries.

| kind | V | vectors of a block | s |
|---|---|---|---|
| cumulant | 2 | `mean = sum w k`, `var = sum w (k - mean)^2` | `c q.mean + c^2 / 2 * q^2.var` |
| minmax | 2 | lower and upper bound of each channel | `c sum_d max(q_d lower_d, q_d upper_d)` |
| moba | 1 | plain mean | `q.mean`, for each query head by itself |
| infllm_v2 | - | means of 32-token windows at stride 16 | see `infllm_v2_scores` |

with c the softmax scale. Bounds under punctuation are blends, `lambda` times those of the block plus
`1 - lambda` times those of its punctuation tokens, where it has any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phsa_kernels.reference import _best_blocks, _chunks_by_document, _lengths, _wide

KINDS = ("cumulant", "minmax", "moba", "infllm_v2")
WINDOW_TOKENS, STRIDE_TOKENS = 32, 16
"""InfLLM-V2's pooling windows."""
_CPU_CHUNK_QUERIES, _GPU_CHUNK_QUERIES = 128, 4096
COARSE_WINDOW_TOKENS, COARSE_STRIDE_TOKENS = 128, 64
"""InfLLM-V2's windows for an approximate normalizer."""


def block_vectors(
    keys: Tensor, kind: str, weights: Tensor | None, marks: Tensor | None, mean_weight_frac: float
) -> Tensor:
    """Return the vectors [blocks, Hkv, V, D] of one document's complete blocks, in the wide dtype.

    Args:
        keys: [blocks, m, Hkv, D], wide.
        kind: 'cumulant', 'minmax' or 'moba'.
        weights: [blocks, m] or [blocks, m, Hkv] that sum to 1 in every block, or None for 1/m; minmax and
            moba ignore them.
        marks: bool [blocks, m] or [blocks, m, Hkv], punctuation; only minmax reads them. None is plain.
        mean_weight_frac: lambda of minmax's blend.
    """
    num_blocks, m = keys.shape[:2]
    if kind == "moba":
        return keys.mean(1).unsqueeze(2)
    if kind == "minmax":
        return _bounds(keys, marks, mean_weight_frac)
    w = keys.new_full((num_blocks, m), 1.0 / m) if weights is None else weights.to(keys.dtype)
    w = w.view(num_blocks, m, -1, 1)
    mean = (w * keys).sum(1)
    return torch.stack([mean, (w * (keys - mean[:, None]).square()).sum(1)], dim=2)


def _bounds(keys: Tensor, marks: Tensor | None, mean_weight_frac: float) -> Tensor:
    lower, upper = keys.amin(1), keys.amax(1)
    if marks is not None:
        flagged = marks.view(*marks.shape[:2], -1, 1)
        any_mark = flagged.any(1)
        mark_lower = keys.masked_fill(~flagged, math.inf).amin(1)
        mark_upper = keys.masked_fill(~flagged, -math.inf).amax(1)
        lam = mean_weight_frac
        lower = torch.where(any_mark, lam * lower + (1 - lam) * mark_lower, lower)
        upper = torch.where(any_mark, lam * upper + (1 - lam) * mark_upper, upper)
    return torch.stack([lower, upper], dim=2)


def head_scores(q: Tensor, vectors: Tensor, kind: str, scale: float) -> Tensor:
    """Return s [n, Hkv, R, blocks] for queries [n, Hkv, R, D] and one document's block vectors."""
    first, second = vectors[:, :, 0], vectors[:, :, -1]

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("nhrd,bhd->nhrb", x, y)

    if kind == "moba":
        return dot(q, first)
    if kind == "cumulant":
        return scale * dot(q, first) + 0.5 * scale**2 * dot(q.square(), second)
    # q_d * upper_d where q_d > 0 and q_d * lower_d elsewhere is the larger product.
    return scale * (dot(q.clamp(min=0), second) + dot(q.clamp(max=0), first))


def _group(scores: Tensor, current: Tensor, group_score: str) -> Tensor:
    """Return [n, Hkv, blocks] of per-head scores, as PHSA shares them."""
    if group_score == "raw_sum":
        return scores.sum(2)
    before = (torch.arange(scores.shape[-1], device=scores.device) < current[:, None])[:, None, None]
    return scores.masked_fill(~before, -math.inf).softmax(-1).nan_to_num(0.0).sum(2)


def windows(keys: Tensor, window_tokens: int, stride_tokens: int) -> Tensor:
    """Return the means [windows, Hkv, D] of a document's complete windows; keys are [tokens, Hkv, D]."""
    if len(keys) < window_tokens:
        return keys.new_zeros(0, *keys.shape[1:])
    return keys.unfold(0, window_tokens, stride_tokens).mean(-1)


def infllm_v2_scores(
    q: Tensor, keys: Tensor, position: Tensor, block_tokens: int, scale: float, coarse_lse: bool
) -> Tensor:
    """Return InfLLM-V2's block scores [n, Hkv, blocks] of one document.

    A window is visible once its last token is at or before the query. Per head, softmax over the visible
    windows; summed over the group's heads; a block takes the largest of the windows that overlap it. A
    block without a visible window has 0. With `coarse_lse` the normalizer is the log-sum-exp over visible
    windows of 128 tokens at stride 64, or over the fine ones where there is none yet.

    Args:
        q: [n, Hkv, R, D], wide.
        keys: [tokens, Hkv, D], wide: the document.
        position: int64 [n], in the document.
        block_tokens: m, a multiple of the stride, 16.
        scale: of the dot products.
        coarse_lse: approximate the normalizer.
    """
    pooled = _infllm_v2_windows(keys, coarse_lse)
    return _scores_of_windows(q, pooled, position, len(keys) // block_tokens, block_tokens, scale)


def _infllm_v2_windows(keys: Tensor, coarse_lse: bool) -> list[Tensor]:
    """Return a document's fine windows, and with `coarse_lse` its coarse ones."""
    sizes = [(WINDOW_TOKENS, STRIDE_TOKENS), (COARSE_WINDOW_TOKENS, COARSE_STRIDE_TOKENS)]
    return [windows(keys, *size) for size in sizes[: 1 + coarse_lse]]


def _scores_of_windows(
    q: Tensor, pooled: list[Tensor], position: Tensor, num_blocks: int, block_tokens: int, scale: float
) -> Tensor:
    """Return the scores of `infllm_v2_scores` from the windows of `_infllm_v2_windows`."""
    per_block = block_tokens // STRIDE_TOKENS
    fine = _window_scores(q, pooled[0], position, WINDOW_TOKENS, STRIDE_TOKENS, scale)
    lse = fine.logsumexp(-1, keepdim=True)
    if len(pooled) > 1:
        coarse = _window_scores(q, pooled[1], position, COARSE_WINDOW_TOKENS, COARSE_STRIDE_TOKENS, scale)
        rough = coarse.logsumexp(-1, keepdim=True)
        lse = torch.where(rough.isfinite(), rough, lse)
    # Without a visible window both are -inf, and their difference NaN.
    shared = (fine - lse).exp().nan_to_num(0.0).sum(2)
    # Windows b * r - 1 to b * r + r - 1 overlap block b of r strides; outside the document nothing does.
    wanted = num_blocks * per_block + 1
    shared = torch.nn.functional.pad(shared, (1, max(0, wanted - 1 - shared.shape[-1])))
    if num_blocks == 0:
        return shared[..., :0]
    return shared.unfold(-1, per_block + 1, per_block)[..., :num_blocks, :].amax(-1)


def _window_scores(
    q: Tensor, pooled: Tensor, position: Tensor, window_tokens: int, stride_tokens: int, scale: float
) -> Tensor:
    end = torch.arange(len(pooled), device=pooled.device) * stride_tokens + window_tokens - 1
    scores = torch.einsum("nhrd,whd->nhrw", q, pooled) * scale
    return scores.masked_fill((end > position[:, None])[:, None, None], -math.inf)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: str,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int = 16,
    group_score: str = "softmax_sum",
    weights: Tensor | None = None,
    marks: Tensor | None = None,
    mean_weight_frac: float = 0.5,
    coarse_lse: bool = False,
    softmax_scale: float | None = None,
    impl: str = "reference",
) -> Tensor:
    """Return the chosen blocks int32 [Tq, Hsel, k], as `api.select` does; Hsel is Hq for moba, else Hkv.

    Args:
        q: queries [Tq, Hq, D] after RoPE.
        k: keys [Tk, Hkv, D] after RoPE, all documents.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        cu_seqlens: int32 [N + 1] document boundaries.
        kind: one of KINDS.
        topk: k >= 1.
        init_tokens: as in `api.select`.
        local_tokens: as in `api.select`.
        block_tokens: m; infllm_v2 needs a multiple of 16.
        group_score: 'softmax_sum' or 'raw_sum'; moba (per head) and infllm_v2 (softmax) have their own.
        weights: fp32 [Tk] or [Tk, Hkv] pooling weights, for cumulant joined with punctuation.
        marks: bool [Tk] or [Tk, Hkv] punctuation, for minmax joined with it.
        mean_weight_frac: lambda of minmax's blend.
        coarse_lse: infllm_v2's approximate normalizer.
        softmax_scale: default D ** -0.5.
        impl: only 'reference'.

    Raises:
        ValueError: an unknown kind, or a block size that it cannot have.
        NotImplementedError: another impl.

    Deterministic; ties go to the lower block.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if impl != "reference":
        raise NotImplementedError(f"selector {kind!r} has impl='reference' only, not {impl!r}")
    if kind == "infllm_v2" and block_tokens % STRIDE_TOKENS:
        raise ValueError(
            f"infllm_v2 pools at stride {STRIDE_TOKENS}: block_tokens={block_tokens} is no multiple"
        )
    m, wide, num_kv_heads = block_tokens, _wide(q.dtype), k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    lengths, starts = _lengths(cu_seqlens, len(k)), cu_seqlens.tolist()
    num_selectors = q.shape[1] if kind == "moba" else num_kv_heads
    ids = torch.full((len(q), num_selectors, topk), -1, dtype=torch.int32, device=q.device)
    vectors_of_doc: dict[int, Tensor] = {}
    windows_of_doc: dict[int, list[Tensor]] = {}

    def vectors(doc: int) -> Tensor:
        if doc not in vectors_of_doc:
            end = starts[doc] + lengths[doc] // m * m

            def in_blocks(x: Tensor) -> Tensor:
                return x[starts[doc] : end].reshape(-1, m, *x.shape[1:])

            vectors_of_doc[doc] = block_vectors(
                in_blocks(k.to(wide)),
                kind,
                None if weights is None else in_blocks(weights),
                None if marks is None else in_blocks(marks),
                mean_weight_frac,
            )
        return vectors_of_doc[doc]

    # Few large chunks keep a GPU busy; a CPU keeps small ones in its caches.
    chunk = _GPU_CHUNK_QUERIES if q.is_cuda else _CPU_CHUNK_QUERIES
    for doc, rows in _chunks_by_document(q_doc, chunk):
        if lengths[doc] < m:
            continue
        position = q_pos[rows].long()
        current = position // m
        queries = q[rows].to(wide).reshape(len(rows), num_kv_heads, -1, q.shape[2])
        if kind == "infllm_v2":
            if doc not in windows_of_doc:
                document = k[starts[doc] : starts[doc + 1]].to(wide)
                windows_of_doc[doc] = _infllm_v2_windows(document, coarse_lse)
            pooled = windows_of_doc[doc]
            scores = _scores_of_windows(queries, pooled, position, lengths[doc] // m, m, scale)
        else:
            scores = head_scores(queries, vectors(doc), kind, scale)
            scores = scores.flatten(1, 2) if kind == "moba" else _group(scores, current, group_score)
        ids[rows] = _best_blocks(scores, current, topk, init_tokens // m, local_tokens // m)
    return ids


def max_norm_flags(k: Tensor, q_pos: Tensor, cu_seqlens: Tensor, block_tokens: int) -> Tensor:
    """Return bool [Tk, Hkv]: whether a key has the largest norm of its block; the first of equals.

    RoPE keeps norms, so that in a model's first layer the keys of equal tokens have equal norms up to
    rounding: which of them is flagged there may differ between devices and dtypes.

    Args:
        k: keys [Tk, Hkv, D].
        q_pos: int32 [Tk], position of every key in its document.
        cu_seqlens: int32 [N + 1]; keys of incomplete last blocks are never flagged.
        block_tokens: m.
    """
    flags = torch.zeros(k.shape[:2], dtype=torch.bool, device=k.device)
    first = (q_pos % block_tokens == 0).nonzero().flatten()
    doc = torch.searchsorted(cu_seqlens, first.to(cu_seqlens.dtype), right=True) - 1
    first = first[first + block_tokens <= cu_seqlens[doc + 1]]
    tokens = first[:, None] + torch.arange(block_tokens, device=k.device)
    norms = k.to(_wide(k.dtype)).square().sum(-1)[tokens]  # [blocks, m, Hkv]
    best = norms.argmax(1)  # the first of equals
    flags[first[:, None] + best, torch.arange(k.shape[1], device=k.device)] = True
    return flags


__all__ = ["KINDS", "infllm_v2_scores", "max_norm_flags", "select_blocks", "windows"]
