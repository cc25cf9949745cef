"""A second, independent reading of the method page: plain loops over queries, heads and blocks, in fp64.

Nothing here is shared with `phsa_kernels`; the tests compare the reference (and the reference alone) with it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    topk: int
    init_tokens: int
    local_tokens: int
    block_tokens: int
    group_score: str = "softmax_sum"
    dense_len_tokens: int = 0

    def select_kwargs(self) -> dict:
        return {
            "topk": self.topk,
            "init_tokens": self.init_tokens,
            "local_tokens": self.local_tokens,
            "block_tokens": self.block_tokens,
            "group_score": self.group_score,
        }

    def attend_kwargs(self) -> dict:
        return {
            "init_tokens": self.init_tokens,
            "local_tokens": self.local_tokens,
            "block_tokens": self.block_tokens,
            "dense_len_tokens": self.dense_len_tokens,
        }

    def kwargs(self) -> dict:
        return self.select_kwargs() | self.attend_kwargs()


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def punctuation_weights(is_punctuation: list[bool], lengths: list[int], m: int, lam: float = 0.5) -> Tensor:
    """w_l = lam / n + (1 - lam) * I_l / c in a block of n tokens with c > 0 marked ones, else 1 / n."""
    weights = []
    start = 0
    for length in lengths:
        for first in range(0, length, m):
            block = is_punctuation[start + first : start + min(first + m, length)]
            n, c = len(block), sum(block)
            weights += [lam / n + (1 - lam) * flag / c if c else 1 / n for flag in block]
        start += length
    return torch.tensor(weights, dtype=torch.float64)


def pooled_blocks(k: Tensor, is_punctuation: list[bool], lengths: list[int], m: int, lam: float) -> Tensor:
    """M(b) = lam * M0(b) + (1 - lam) * Mp(b) of every complete block, one after another, [blocks, Hkv, D]."""
    rows, start = [], 0
    for length in lengths:
        for first in range(0, length - m + 1, m):
            tokens = range(start + first, start + first + m)
            mean = sum(k[t] for t in tokens) / m
            marked = [t for t in tokens if is_punctuation[t]]
            punctuation = sum(k[t] for t in marked) / len(marked) if marked else mean
            rows.append(lam * mean + (1 - lam) * punctuation)
        start += length
    return torch.stack(rows) if rows else k.new_zeros(0, *k.shape[1:])


def block_scores(q: Tensor, pooled: Tensor, current: int, head: int, setting: Setting) -> list[float]:
    """Score of every complete block before `current` for one query [Hq, D] and one key-value head."""
    group = q.shape[0] // pooled.shape[1]
    total = [0.0] * min(current, len(pooled))
    for r in range(group):
        dots = [
            float(q[head * group + r] @ pooled[b, head]) / math.sqrt(q.shape[1]) for b in range(len(total))
        ]
        if setting.group_score == "softmax_sum" and dots:
            peak = max(dots)
            norm = sum(math.exp(d - peak) for d in dots)
            dots = [math.exp(d - peak) / norm for d in dots]
        total = [t + d for t, d in zip(total, dots, strict=True)]
    return total


def chosen_blocks(q: Tensor, pooled: Tensor, position: int, head: int, setting: Setting) -> list[int]:
    """Top-k of the complete blocks after init and before local; equal scores go to the lower block."""
    m = setting.block_tokens
    current = position // m
    scores = block_scores(q, pooled, current, head, setting)
    first, last = setting.init_tokens // m, current - setting.local_tokens // m
    candidates = range(first, last + 1)
    return sorted(sorted(candidates, key=lambda b: (-scores[b], b))[: setting.topk])


def attended_positions(position: int, chosen: list[int], length: int, setting: Setting) -> list[int]:
    if length <= setting.dense_len_tokens:
        return list(range(position + 1))
    m = setting.block_tokens
    first_local_block = position // m - setting.local_tokens // m + 1
    keep = []
    for key in range(position + 1):
        in_init = key < setting.init_tokens
        in_local = key // m >= first_local_block
        if in_init or in_local or key // m in chosen:
            keep.append(key)
    return keep


def attention(
    q: Tensor, k: Tensor, v: Tensor, is_punctuation: list[bool], lengths: list[int], setting: Setting
):
    """(out [T, Hq, D], lse [T, Hq], chosen list[T][Hkv]) of the whole method, every token a query."""
    num_kv_heads = k.shape[1]
    group = q.shape[1] // num_kv_heads
    pooled = pooled_blocks(k.detach(), is_punctuation, lengths, setting.block_tokens, lam=0.5)
    outs, lses, chosen_of = [], [], []
    start = first_block = 0
    for length in lengths:
        own = pooled[first_block : first_block + length // setting.block_tokens]
        for position in range(length):
            token = start + position
            row_out, row_lse, row_chosen = [], [], []
            for head in range(num_kv_heads):
                chosen = chosen_blocks(q[token].detach(), own, position, head, setting)
                row_chosen.append(chosen)
                keys = [start + p for p in attended_positions(position, chosen, length, setting)]
                for r in range(group):
                    scores = k[keys, head] @ q[token, head * group + r] / math.sqrt(q.shape[2])
                    row_out.append(scores.softmax(0) @ v[keys, head])
                    row_lse.append(scores.logsumexp(0))
            outs.append(torch.stack(row_out))
            lses.append(torch.stack(row_lse))
            chosen_of.append(row_chosen)
        start += length
        first_block += length // setting.block_tokens
    return torch.stack(outs), torch.stack(lses), chosen_of


def as_lists(ids: Tensor) -> list[list[list[int]]]:
    """Chosen ids [T, H, k] as lists without the padding."""
    return [[[b for b in head if b >= 0] for head in row] for row in ids.tolist()]
