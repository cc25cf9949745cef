"""What selection does, measured in evaluation: the attention that chosen blocks carry, and how sparse it is.

A layer hands its selection to the recorder on the SideInfo. Everything is kept as sums, so that the sums of
all processes add up to those of the run: tensor-parallel processes have different heads, pipeline stages
different layers, data-parallel processes different text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_kernels.api import attend, token_positions
from phsa_megatron.attention.selection_shape import NUM_COLUMNS, SelectionShape, shape_sums
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig

_COLUMNS = ("rows", "selected_mass", "attended_keys", "causal_keys", "rows_with_a_choice")


@dataclass(frozen=True)
class LayerSelection:
    """Selection statistics of one layer, over the sampled queries of all its heads."""

    selected_mass_frac: float
    """Share of a query's softmax probability that lies on the selected blocks."""
    attended_key_frac: float
    """Attended keys over causal keys, both summed over queries: 1 is dense."""
    frac_queries_with_more_candidates_than_k: float
    """Share of queries for which selection had to leave a candidate block out."""


class SelectionRecorder:
    """Sums up the selection of every PHSA layer over the micro-batches that it rides on.

    Attributes:
        sums: fp64 [layers, 5] on the CPU; rows of layers that this process does not have stay 0.
        shapes: fp64 [layers, NUM_COLUMNS] on the CPU, see `selection_shape`.
    """

    def __init__(self, num_layers: int, max_rows: int = 256) -> None:
        """Make an empty recorder.

        Args:
            num_layers: layers of the main stack, over all pipeline stages.
            max_rows: queries looked at per layer and micro-batch, evenly spaced over its tokens.
        """
        self.sums = torch.zeros(num_layers, len(_COLUMNS), dtype=torch.float64)
        self.shapes = torch.zeros(num_layers, NUM_COLUMNS, dtype=torch.float64)
        self.max_rows = max_rows

    @torch.no_grad()
    def record(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ids: Tensor,
        lse: Tensor,
        side_info: SideInfo,
        tokens: Tensor | None = None,
        block_slot: Tensor | None = None,
    ) -> None:
        """Add one layer's selection of one micro-batch.

        The window's share of the softmax comes from a second attention over the window alone, for the sampled
        queries: 1 - exp(lse_window - lse) is left for the selected blocks.

        Args:
            layer_number: from 1.
            query: [Tq, Hq, D].
            key: [T, Hkv, D], or the blocks that the queries attend to.
            value: of the same shape.
            ids: int32 [Tq, Hkv, k], the chosen blocks.
            lse: fp32 [Tq, Hq], log-sum-exp over all attended keys.
            side_info: of this micro-batch.
            tokens: int64 [Tq], which of the T tokens the queries are; None if they are all of them, in order.
                Context-parallel processes sample the same tokens as one process, each among its own.
            block_slot: where the blocks of key and value lie, as `attend` takes it; None: in natural order.
        """
        settings = side_info.attention
        position, document = side_info.positions()
        num_tokens = side_info.token_ids.numel()
        own = slice(None) if tokens is None else tokens
        self.shapes[layer_number - 1] += shape_sums(
            ids, position[own], document[own], side_info, self.max_rows
        ).cpu()
        sample = torch.linspace(0, num_tokens - 1, min(num_tokens, self.max_rows), device=query.device).long()
        if tokens is None:
            rows = sample
        else:
            rows = torch.isin(tokens, sample).nonzero().flatten()
            sample = tokens[rows]
        q_pos, q_doc = position[sample], document[sample]
        _, window_lse = attend(
            query[rows],
            key,
            value,
            ids[rows, :, :0],
            q_pos,
            q_doc,
            side_info.cu_seqlens,
            block_slot,
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            dense_len_tokens=settings.dense_len_tokens,
            impl=settings.impl.value,
        )
        selected_mass = -torch.expm1((window_lse - lse[rows]).double())
        length = (side_info.cu_seqlens[1:] - side_info.cu_seqlens[:-1])[q_doc]
        attended = _attended_keys(q_pos, length, ids[rows], settings)
        choice = _has_choice(q_pos, length, settings, side_info.topk_of(layer_number))
        num_heads, num_selectors = query.shape[1], ids.shape[1]
        self.sums[layer_number - 1] += torch.stack(
            [
                torch.tensor(float(len(rows) * num_heads), dtype=torch.float64, device=query.device),
                selected_mass.sum(),
                attended.sum().double() * (num_heads / num_selectors),
                (q_pos.double() + 1).sum() * num_heads,
                choice.double().sum() * num_heads,
            ]
        ).cpu()

    def shapes_by_layer(self, shapes: Tensor | None = None) -> dict[int, SelectionShape]:
        """Return what was chosen by layer number, and over all layers as number 0; as `layers` otherwise."""
        table = (self.shapes if shapes is None else shapes).cpu()
        found = {n: SelectionShape.of(row) for n, row in enumerate(table, start=1) if row.any()}
        return {0: SelectionShape.of(table.sum(0)), **found} if found else {}

    def layers(self, sums: Tensor | None = None) -> dict[int, LayerSelection]:
        """Return the statistics by layer number, from 1; layers without a record are left out.

        Args:
            sums: `self.sums` added up over processes; None takes those of this process.
        """
        table = (self.sums if sums is None else sums).tolist()
        return {
            number: LayerSelection(mass / rows, attended / causal, choice / rows)
            for number, (rows, mass, attended, causal, choice) in enumerate(table, start=1)
            if rows
        }


def frac_queries_with_more_candidates_than_k(
    cu_seqlens: Tensor, settings: AttentionConfig, topk: int
) -> float:
    """Return the share of all queries for which selection leaves at least one candidate block out.

    At 0 the recipe computes dense attention (or attention over everything but padding) whatever k is.

    Args:
        cu_seqlens: int32 [N + 1], document boundaries.
        settings: windows, block size and dense_len_tokens are read.
        topk: k.
    """
    num_tokens = int(cu_seqlens[-1])
    if num_tokens == 0:
        return 0.0
    position, document = token_positions(cu_seqlens, num_tokens)
    length = (cu_seqlens[1:] - cu_seqlens[:-1])[document]
    return _has_choice(position, length, settings, topk).double().mean().item()


def _has_choice(position: Tensor, length: Tensor, settings: AttentionConfig, topk: int) -> Tensor:
    """Return bool [n]: whether queries at `position` in documents of `length` have more than k candidates."""
    m = settings.block_tokens
    candidates = position // m - settings.local_tokens // m - settings.init_tokens // m + 1
    return (candidates > topk) & (length > settings.dense_len_tokens)


def _attended_keys(position: Tensor, length: Tensor, ids: Tensor, settings: AttentionConfig) -> Tensor:
    """Return int64 [n, Hkv]: keys that queries at `position` attend to, having chosen `ids` [n, Hkv, k]."""
    m = settings.block_tokens
    causal = position.long() + 1
    local_start = ((position.long() // m - settings.local_tokens // m + 1) * m).clamp(min=0)
    window = causal - (local_start - settings.init_tokens).clamp(min=0)
    sparse = window[:, None] + (ids >= 0).sum(-1) * m
    return torch.where((length <= settings.dense_len_tokens)[:, None], causal[:, None], sparse)
