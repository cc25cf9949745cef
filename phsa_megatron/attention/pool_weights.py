"""The weight of each key in its block's pooled key (method, section 2).

One weighted sum does both branches: `w = lambda / n + (1 - lambda) * I / c` in a block of n tokens with c >
0 punctuation tokens, else `1 / n`. It depends on token ids only, so that one tensor serves all layers and
heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phsa_kernels.api import token_positions


def pool_weights(
    is_punctuation: Tensor, cu_seqlens: Tensor, *, block_tokens: int, mean_weight_frac: float
) -> Tensor:
    """Return the weights, fp32, in the shape of `is_punctuation`. They sum to 1 in every block.

    Blocks restart at every document; the last block of a document may be incomplete, and its n is its own
    length. All shapes are fixed and nothing is copied to the host.

    Args:
        is_punctuation: bool [b, S] or [T]: whether a token is in the punctuation set, tokens in natural
            order.
        cu_seqlens: int32 [N + 1], document boundaries over the flattened tokens; repeats are empty documents.
        block_tokens: tokens per block (m).
        mean_weight_frac: lambda, the weight of the plain mean.

    Deterministic. Source: method page, section 2.
    """
    flags = is_punctuation.reshape(-1).float()
    position, _ = token_positions(cu_seqlens, len(flags))
    # The index of a block's first token names the block: unique, and no count of blocks is needed.
    token = torch.arange(len(flags), device=flags.device)
    block = token - position % block_tokens
    num_tokens = torch.zeros_like(flags).index_add(0, block, torch.ones_like(flags))[block]
    num_marks = torch.zeros_like(flags).index_add(0, block, flags)[block]
    both = mean_weight_frac / num_tokens + (1.0 - mean_weight_frac) * flags / num_marks.clamp(min=1.0)
    return torch.where(num_marks > 0, both, 1.0 / num_tokens).view(is_punctuation.shape)
