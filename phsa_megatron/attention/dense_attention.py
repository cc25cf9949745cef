"""Full causal and sliding-window attention inside every document, by torch's own kernels.

Work is the sum of documents' squared lengths (of their lengths times the window) and no mask of S x S exists.
megatron's own local attention builds that mask and knows no documents. On a GPU documents of many lengths are
one launch; elsewhere they are attended one by one. Letters as in `core_attention.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.side_info import SideInfo

_CHUNK_QUERIES = 256
_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""cuDNN is about twice as fast as flash on an H100. But it plans every new length anew, which takes the host
tens of milliseconds, forward and backward: it is asked only where all documents have one length, as where a
sequence is a document. Some versions of torch put it last by themselves, others first, so both orders are
said."""
_OF_ANY_LENGTH = _FASTEST_FIRST[1:]
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Window:
    """What a query of a sliding window sees: the document's first tokens, and the last ones up to itself."""

    init_tokens: int
    local_tokens: int


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    side_info: SideInfo,
    scale: float | None,
    window: Window | None = None,
    dense_len_tokens: int = 0,
) -> Tensor:
    """Return [T, Hq, D] for query [T, Hq, D], key and value [T, Hkv, D].

    Args:
        query: all tokens of a micro-batch, after RoPE.
        key: after RoPE.
        value: as key.
        side_info: of the micro-batch.
        scale: of the dot products; None is D ** -0.5.
        window: None is full causal attention.
        dense_len_tokens: documents of up to this many tokens have no window.
    """
    bounds = side_info.document_bounds()
    length = bounds[0][1] - bounds[0][0]
    if window is None and all(end - start == length for start, end in bounds):
        # As when a sequence is one document: one call for all of them.
        q, k, v = (x.view(len(bounds), length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return _causal(q, k, v, scale).transpose(1, 2).reshape(query.shape)
    if window is None and query.is_cuda and query.dtype in _FLASH_DTYPES and _varlen() is not None:
        return _packed(query, key, value, side_info, scale)
    whole = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, T, D]
    # Split and not sliced: the backward pass of a slice fills a tensor of all tokens for each document.
    lengths = [end - start for start, end in bounds]
    documents = []
    for q, k, v in zip(*(torch.split(x, lengths, dim=2) for x in whole), strict=True):
        if window is None or q.shape[2] <= max(dense_len_tokens, window.local_tokens):
            with sdpa_kernel(_OF_ANY_LENGTH, set_priority=True):
                documents.append(_causal(q, k, v, scale))
        else:
            documents += _windowed(q, k, v, scale, window)
    return torch.cat(documents, dim=2).squeeze(0).transpose(0, 1).reshape(query.shape)


def _packed(query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo, scale: float | None) -> Tensor:
    """Return [T, Hq, D]: causal attention in documents of any lengths, by one kernel for all of them."""
    attend, documents = _varlen(), side_info.document_bounds()
    assert attend is not None

    def starts() -> Tensor:
        # The micro-batch has places for many more documents, and empty ones are work for this kernel.
        ends = [0, *(end for _, end in documents)]
        on_host = torch.tensor(ends, dtype=torch.int32, pin_memory=query.is_cuda)
        return on_host.to(query.device, non_blocking=True)

    bounds = side_info.once("document_starts", starts)
    longest = max(end - start for start, end in documents)
    out: Tensor = attend(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0)
    )
    return out


@cache
def _varlen() -> Callable[..., Any] | None:
    """Return torch's flash attention for documents of many lengths; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Groups have always shared keys; from 2.12 on it has to be said.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Return [b, Hq, S, D] for q [b, Hq, S, D], k and v [b, Hkv, S, D]; a query sees all keys up to it."""
    grouped = q.shape[1] > k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


def dense_sharded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    side_info: SideInfo,
    shard: ContextShard,
    scale: float | None,
    window: Window | None = None,
    dense_len_tokens: int = 0,
) -> Tensor:
    """Return [Tq, Hq, D] for this process's query [Tq, Hq, D], key and value [Tq, Hkv, D]; as `dense`."""
    gathering = shard.start_keys_and_values(key, value)
    keys, values, _ = shard.keys_and_values(key, value, gathering, None, side_info)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))  # [1, H, Tq or T, D]
    lengths = {start: end - start for start, end in side_info.document_bounds()}
    pieces = []
    for piece in shard.document_pieces(side_info):
        part = (
            q[:, :, piece.own_start : piece.own_end],
            k[:, :, piece.keys_start : piece.keys_end],
            v[:, :, piece.keys_start : piece.keys_end],
        )
        length = lengths[piece.keys_start]
        if window is None or length <= max(dense_len_tokens, window.local_tokens):
            grouped = query.shape[1] > key.shape[1]
            # The last query sees the last key.
            mask = causal_lower_right(part[0].shape[2], part[1].shape[2])
            pieces.append(
                scaled_dot_product_attention(*part, attn_mask=mask, scale=scale, enable_gqa=grouped)
            )
        else:
            pieces += _windowed(*part, scale, window)
    return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).reshape(query.shape)


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: Window) -> Iterator[Tensor]:
    """Yield [1, Hq, n, D] of successive queries; the last query of q [1, Hq, N, D] is at the last key."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    for start in range(0, num_queries, _CHUNK_QUERIES):
        end = min(start + _CHUNK_QUERIES, num_queries)
        position = torch.arange(start, end, device=q.device)[:, None] + num_keys - num_queries
        first = max(0, start + num_keys - num_queries - window.local_tokens + 1)
        # Only the keys that some query of the chunk sees.
        init = torch.arange(min(window.init_tokens, first), device=q.device)
        local = torch.arange(first, end + num_keys - num_queries, device=q.device)
        key = torch.cat([init, local])
        seen = (key <= position) & ((key < window.init_tokens) | (key > position - window.local_tokens))
        yield scaled_dot_product_attention(
            q[:, :, start:end],
            k[:, :, key],
            v[:, :, key],
            attn_mask=seen,
            scale=scale,
            enable_gqa=q.shape[1] > k.shape[1],
        )
