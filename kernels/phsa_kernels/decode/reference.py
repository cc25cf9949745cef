"""The specification of the ops of generation: eager PyTorch, sequence by sequence, on `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from phsa_kernels import reference


@torch.no_grad()
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
    block_tokens: int,
    mean_weight_frac: float,
) -> None:
    """Append one token a sequence, in place; see `phsa_kernels.decode.door.append_keys`."""
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        if not 0 < length <= k_cache.shape[1]:
            raise ValueError(f"lengths[{row}]={length}: the caches hold {k_cache.shape[1]} tokens")
        position = length - 1
        k_cache[row, position], v_cache[row, position] = k[row], v[row]
        if position % block_tokens == 0:
            open_sums[row] = 0
            open_marks[row] = 0
        open_sums[row, :, 0] += k[row]
        if marks[row]:
            open_sums[row, :, 1] += k[row]
            open_marks[row] += 1
        if length % block_tokens == 0:
            mean = open_sums[row, :, 0] / block_tokens
            marked = open_sums[row, :, 1] / open_marks[row].clamp(min=1)[:, None]
            both = mean_weight_frac * mean + (1 - mean_weight_frac) * marked
            pooled = torch.where(open_marks[row][:, None] > 0, both, mean)
            pooled_cache[row, position // block_tokens] = pooled.to(pooled_cache.dtype)


@torch.no_grad()
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
    block_tokens: int,
    group_score: str,
    dense_len_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, ids); see `phsa_kernels.decode.door.decode_attention`."""
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    ids = torch.full((len(q), k_cache.shape[2], topk), -1, dtype=torch.int32, device=q.device)
    windows = {"init_tokens": init_tokens, "local_tokens": local_tokens, "block_tokens": block_tokens}
    first = lengths.new_zeros(1)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        if not 0 < length <= k_cache.shape[1]:
            raise ValueError(f"lengths[{row}]={length}: the caches hold {k_cache.shape[1]} tokens")
        complete = length // block_tokens
        query, last = q[row : row + 1], first + (length - 1)
        if topk and length > dense_len_tokens:
            ids[row] = reference.select(
                query, pooled_cache[row, :complete].unsqueeze(2), last, first,
                torch.cat([first, first + complete]), topk=topk, group_score=group_score, score="dot",
                softmax_scale=softmax_scale, **windows,
            )[0]  # fmt: skip
        found = reference.attend(
            query, k_cache[row, :length], v_cache[row, :length], ids[row : row + 1], last, first,
            torch.cat([first, first + length]), None, dense_len_tokens=dense_len_tokens,
            softmax_scale=softmax_scale, **windows,
        )  # fmt: skip
        out[row], lse[row] = found[0][0], found[1][0]
    return out, lse, ids
