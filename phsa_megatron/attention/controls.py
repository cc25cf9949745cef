"""Which tokens of a block stand in its second branch: punctuation, or what a control puts in its place.

A control keeps everything else of PHSA, so that a gain of punctuation over it is due to punctuation. None
looks past the block it flags: a future token never changes an earlier selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phsa_kernels.api import token_positions
from phsa_megatron.config.schema import AttentionConfig, Selector

_PRIME = (1 << 31) - 1


def branch_flags(
    is_punctuation: Tensor, token_ids: Tensor, cu_seqlens: Tensor, attention: AttentionConfig
) -> Tensor:
    """Return bool [b, S]: the tokens whose mean is a block's second branch.

    Args:
        is_punctuation: bool [b, S]; for the selectors `shuffled` and `separators` the table behind it is
            another one already.
        token_ids: int64 [b, S].
        cu_seqlens: int32 [N + 1], document boundaries over the flattened tokens.
        attention: `selector`, `block_tokens` and `control_seed` are read. The selector `max_norm` reads keys
            and has flags of its own.
    """
    if attention.selector == Selector.last_token:
        position, _ = token_positions(cu_seqlens, token_ids.numel())
        last = position % attention.block_tokens == attention.block_tokens - 1
        return last.view(token_ids.shape)
    if attention.selector == Selector.random_tokens:
        flags = random_flags(
            is_punctuation.reshape(-1),
            token_ids.reshape(-1),
            cu_seqlens,
            block_tokens=attention.block_tokens,
            seed=attention.control_seed,
        )
        return flags.view(token_ids.shape)
    return is_punctuation


def random_flags(
    flags: Tensor, token_ids: Tensor, cu_seqlens: Tensor, *, block_tokens: int, seed: int
) -> Tensor:
    """Return bool [T] with as many flags in each block as `flags` has there, on tokens drawn at random.

    The draw depends on the seed, and on the token and its position in its document: not on the batch, the
    layout or the step, so that training, resume and inference agree. All shapes are fixed.
    """
    position, _ = token_positions(cu_seqlens, len(flags))
    token = torch.arange(len(flags), device=flags.device)
    block = token - position % block_tokens  # named by its first token
    draw = _hash(_hash(token_ids.long() + seed * 7919) + position.long())
    # Sorted by block and within it by draw, and by place among equal draws: a token's rank in its block.
    order = draw.argsort(stable=True)
    order = order[block[order].argsort(stable=True)]
    first_of_block = torch.searchsorted(block[order].contiguous(), block[order].contiguous())
    rank = torch.empty_like(order)
    rank[order] = token - first_of_block
    count = torch.zeros_like(block).index_add(0, block, flags.to(block.dtype))[block]
    return rank < count


def _hash(x: Tensor) -> Tensor:
    """Return int64 in [0, 2^31 - 1) that look random: three rounds of a multiplicative hash with a shift."""
    for multiplier in (48271, 69621, 39373):
        x = (x % _PRIME) * multiplier % _PRIME
        x = x ^ (x >> 15)
    return x % _PRIME


def weights_of_flags(flags: Tensor, block_tokens: int, mean_weight_frac: float) -> Tensor:
    """Return fp32 pooling weights in the shape of `flags` [T, Hkv], which flag one key in every full block.

    Args:
        flags: bool.
        block_tokens: m.
        mean_weight_frac: lambda.
    """
    return mean_weight_frac / block_tokens + (1.0 - mean_weight_frac) * flags.float()
