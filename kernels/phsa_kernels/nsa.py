"""The compressed branch of Native Sparse Attention (arXiv 2502.11089, section 3.3), in eager PyTorch.

Windows of 32 keys (and values) at stride 16 become one vector each by a learned function, queries attend to
these vectors, and the probabilities, summed over the heads of a key-value group, choose the blocks of the
selected branch. Windows restart at every document and never cross its end. Unlike the other selectors this
one has weights, and its attention passes gradients to them. Letters as in `api.py`; l = 32, d = 16, E the
width of the compressing MLP, W windows of all documents.

Sources: equation 7 (compression), 8 (probabilities), 9 (scores of blocks from those of windows), 10 (sum over
the group). The paper counts windows and blocks from 1; a block's score is then the probability of every
window times the number of strides that both share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from phsa_kernels.reference import _best_blocks, _chunks_by_document, _lengths, _wide

WINDOW_TOKENS, STRIDE_TOKENS = 32, 16
"""l and d of the paper."""


class Compression(NamedTuple):
    """The weights that make one vector of a window, for each key-value head.

    Attributes:
        position: [Hkv, l, D], added to the window's keys or values: the intra-block position encoding.
        w_in: [Hkv, l * D, E], first layer of the MLP; tokens of the window vary slowest.
        w_out: [Hkv, E, D], its second layer; SiLU between them, no biases.
    """

    position: Tensor
    w_in: Tensor
    w_out: Tensor


class CompressedBranch(NamedTuple):
    """What the compressed branch gives: its output [Tq, Hq, D] and the chosen blocks int32 [Tq, Hkv, k]."""

    out: Tensor
    ids: Tensor


def window_starts(lengths: list[int]) -> tuple[list[int], list[int]]:
    """Return the first token of every window, and how many windows each document has.

    Args:
        lengths: tokens of the documents, one after another.
    """
    starts, counts, first = [], [], 0
    for length in lengths:
        offsets = range(0, length - WINDOW_TOKENS + 1, STRIDE_TOKENS)
        starts += [first + offset for offset in offsets]
        counts.append(len(offsets))
        first += length
    return starts, counts


def compress(x: Tensor, weights: Compression, starts: Tensor) -> Tensor:
    """Return [W, Hkv, D] in the wide dtype for keys or values [Tk, Hkv, D] and window starts int64 [W]."""
    wide = _wide(x.dtype)
    tokens = starts[:, None] + torch.arange(WINDOW_TOKENS, device=x.device)
    windows = x.to(wide)[tokens].permute(2, 0, 1, 3)  # [Hkv, W, l, D]
    windows = windows + weights.position.to(wide)[:, None]
    hidden = silu(torch.bmm(windows.flatten(2), weights.w_in.to(wide)))
    return torch.bmm(hidden, weights.w_out.to(wide)).transpose(0, 1)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Return [n, H, D] turned by RoPE: channels c and c + D / 2 by angle c of [n, D], both halves alike."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def shared_strides(num_windows: int, num_blocks: int, block_tokens: int, device: torch.device) -> Tensor:
    """Return int64 [windows, blocks]: how many strides a window and a block of one document share."""
    per_window, per_block = WINDOW_TOKENS // STRIDE_TOKENS, block_tokens // STRIDE_TOKENS
    window = torch.arange(num_windows, device=device)[:, None]
    block = torch.arange(num_blocks, device=device) * per_block
    end = torch.minimum(window + per_window, block + per_block)
    return (end - torch.maximum(window, block)).clamp(min=0)


def compressed_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    of_keys: Compression,
    of_values: Compression,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    angles: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "reference",
) -> CompressedBranch:
    """Return the compressed branch's output, and the blocks that its probabilities choose.

    A window is visible to a query once its last token is at or before it. A query without a visible window
    has output 0, and its blocks all score 0: the lowest candidates are chosen.

    Keys are compressed before RoPE, and a compressed key is turned by the angles of its window's first token.
    An MLP over turned keys would depend on absolute positions: a document's output would depend on where in a
    sequence it lies. Inside a window the position encoding tells tokens apart. (The paper does not say.)

    Args:
        q: queries [Tq, Hq, D] after RoPE.
        keys: keys of this branch [Tk, Hkv, D] before RoPE, all documents.
        values: its values [Tk, Hkv, D].
        of_keys: weights that compress keys.
        of_values: weights that compress values.
        q_pos: int32 [Tq], position of each query in its document.
        q_doc: int32 [Tq], its document.
        cu_seqlens: int32 [N + 1] document boundaries.
        topk: k >= 1, blocks besides the windows of the selected branch.
        init_tokens: as in `api.select`, of the selected branch.
        local_tokens: as in `api.select`, of the selected branch.
        block_tokens: m, a multiple of 16.
        angles: [Tk, D], RoPE's of each token; None where there is no RoPE.
        softmax_scale: default D ** -0.5.
        impl: only 'reference'.

    Raises:
        ValueError: a block size that is no multiple of the stride.
        NotImplementedError: another impl.

    Deterministic; ties go to the lower block. No gradient flows through the choice of blocks.
    """
    if impl != "reference":
        raise NotImplementedError(f"NSA has impl='reference' only, not {impl!r}")
    if block_tokens % STRIDE_TOKENS:
        raise ValueError(
            f"NSA compresses at stride {STRIDE_TOKENS}: block_tokens={block_tokens} is no multiple"
        )
    m, num_kv_heads = block_tokens, keys.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = _lengths(cu_seqlens, len(keys))
    starts, counts = window_starts(lengths)
    first = torch.tensor(starts, dtype=torch.int64, device=q.device)
    compressed_keys = compress(keys, of_keys, first)
    if angles is not None:
        compressed_keys = turn(compressed_keys, angles[first])
    keys_of_doc = compressed_keys.split_with_sizes(counts)
    values_of_doc = compress(values, of_values, first).split_with_sizes(counts)
    rows_of_all, outs, ids = [], [], []
    for doc, rows in _chunks_by_document(q_doc):
        position = q_pos[rows].long()
        queries = q[rows].to(_wide(q.dtype)).view(len(rows), num_kv_heads, -1, q.shape[2])  # [n, Hkv, R, D]
        share = _probabilities(queries, keys_of_doc[doc], position, scale)
        outs.append(torch.einsum("nhrw,whd->nhrd", share, values_of_doc[doc]).flatten(1, 2))
        overlap = shared_strides(counts[doc], lengths[doc] // m, m, q.device)
        scores = share.detach().sum(2) @ overlap.to(share.dtype)
        ids.append(_best_blocks(scores, position // m, topk, init_tokens // m, local_tokens // m))
        rows_of_all.append(rows)
    undo = torch.cat(rows_of_all).argsort()
    return CompressedBranch(torch.cat(outs)[undo].to(q.dtype), torch.cat(ids)[undo])


def _probabilities(queries: Tensor, keys: Tensor, position: Tensor, scale: float) -> Tensor:
    """Return [n, Hkv, R, windows]: softmax over the visible windows; zeros where there is none."""
    end = torch.arange(len(keys), device=keys.device) * STRIDE_TOKENS + WINDOW_TOKENS - 1
    visible = (end <= position[:, None])[:, None, None]  # [n, 1, 1, windows]
    scores = torch.einsum("nhrd,whd->nhrw", queries, keys) * scale
    # A finite filling: a row without a visible window has a softmax without NaN, and is then zeroed.
    filled = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return filled.softmax(-1) * visible


__all__ = [
    "STRIDE_TOKENS",
    "WINDOW_TOKENS",
    "CompressedBranch",
    "Compression",
    "compress",
    "compressed_attention",
    "shared_strides",
    "turn",
    "window_starts",
]
