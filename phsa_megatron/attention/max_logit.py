"""The largest attention logit of sampled queries: q . k * scale over the document's keys up to the query.

Keys that are not selected count, so that a change of selection moves nothing; what attention really sees is
no larger. Under context parallelism the few sampled queries travel instead of the keys: every process has
those of all, and looks at its own keys. Nothing waits for the device, and a layer that is computed again
changes nothing: the maximum of the same numbers is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.parallel.exchange import sum_over_context

_CHUNK_KEYS = 8192
"""Keys that are looked at together: 32 queries of 32 heads then take 32 MiB."""


class MaxLogitRecorder:
    """Keeps the largest logit by layer over the micro-batches that it rides on; see `SideInfo.logits`.

    Attributes:
        maxima: fp32 [layers], this process's heads and keys alone; -inf where it has seen nothing.
    """

    def __init__(self, num_layers: int, device: torch.device, max_rows: int = 32) -> None:
        """Make an empty recorder.

        Args:
            num_layers: of the main stack, over all pipeline stages.
            device: of the model.
            max_rows: queries looked at per layer and micro-batch, evenly spaced over its tokens.
        """
        self.maxima = torch.full((num_layers,), -math.inf, dtype=torch.float32, device=device)
        self.max_rows = max_rows

    @torch.no_grad()
    def see(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        side_info: SideInfo,
        softmax_scale: float | None = None,
        shard: ContextShard | None = None,
    ) -> None:
        """Look at one layer's queries and keys of one micro-batch. Collective under context parallelism.

        Args:
            layer_number: from 1.
            query: [Tq, Hq, D] after RoPE, this process's tokens.
            key: [Tq, Hkv, D] after RoPE.
            side_info: of the micro-batch.
            softmax_scale: None is D ** -0.5.
            shard: which tokens those are; None if they are all.
        """
        num_tokens = side_info.token_ids.numel()
        rows = min(num_tokens, self.max_rows)
        sample = torch.linspace(0, num_tokens - 1, rows, device=query.device).long()
        if shard is None:
            tokens, queries = torch.arange(num_tokens, device=query.device), query[sample]
        else:
            tokens = shard.tokens(side_info)
            queries = _of_all(query, tokens, sample, shard)
        scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        largest = largest_logit(queries, key, sample, tokens, side_info, scale)
        self.maxima[layer_number - 1] = torch.maximum(self.maxima[layer_number - 1], largest)


def largest_logit(
    queries: Tensor, keys: Tensor, sample: Tensor, tokens: Tensor, side_info: SideInfo, scale: float
) -> Tensor:
    """Return, without dimensions, the largest logit of queries over those of the keys that they may see.

    Computed in fp32 (fp64 of fp64 inputs); -inf if there is no such pair.

    Args:
        queries: [n, Hq, D].
        keys: [Tk, Hkv, D].
        sample: int64 [n], which of the micro-batch's tokens the queries are.
        tokens: int64 [Tk], which the keys are.
        side_info: of the micro-batch.
        scale: of the products.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    grouped = queries.to(wide).view(len(queries), keys.shape[1], -1, keys.shape[2]) * scale
    _, document = side_info.positions()
    largest = torch.full((), -math.inf, dtype=wide, device=keys.device)
    for start in range(0, len(keys), _CHUNK_KEYS):
        at = tokens[start : start + _CHUNK_KEYS]
        logits = torch.einsum("nhrd,khd->nhrk", grouped, keys[start : start + _CHUNK_KEYS].to(wide))
        seen = (document[at] == document[sample][:, None]) & (at <= sample[:, None])
        largest = torch.maximum(largest, logits.masked_fill(~seen[:, None, None], -math.inf).amax())
    return largest


def _of_all(query: Tensor, tokens: Tensor, sample: Tensor, shard: ContextShard) -> Tensor:
    """Return the queries [n, Hq, D] of the tokens `sample`, of which each process has some.

    Every token has one owner, and zeros from all others change no bit of its query.
    """
    place = torch.searchsorted(tokens, sample).clamp(max=len(tokens) - 1)
    owned = (tokens[place] == sample)[:, None, None]
    return sum_over_context(torch.where(owned, query[place], 0.0), shard.groups)
