"""What chosen blocks look like: punctuation in them, distance, agreement of neighbours, spread over blocks.

Everything is kept as sums over queries and heads, so that sums of micro-batches and processes add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_megatron.attention.side_info import SideInfo

NUM_DISTANCES = 16
"""Buckets of distance: n holds 2^n to 2^(n+1) - 1 blocks, the last one all that is further."""
_COLUMNS = (
    "chosen", "punctuation", "distance", "kept_by_neighbour", "of_neighbour", "entropy", "entropies",
    "block_punctuation", "blocks",
)  # fmt: skip
NUM_COLUMNS = len(_COLUMNS) + NUM_DISTANCES


@dataclass(frozen=True)
class SelectionShape:
    """The selection of one layer, or of several; nan where nothing was chosen."""

    selected_punctuation_frac: float
    """Share of punctuation among the tokens of chosen blocks."""
    selected_distance_blocks: float
    """Mean distance of a chosen block from the query's own."""
    neighbour_overlap_frac: float
    """Share of a query's chosen blocks that the query before it chose too."""
    selection_entropy_frac: float
    """Entropy of which blocks of a document are chosen, over that of all its candidates alike, mean over
    documents and heads: near 0, all queries choose the same."""
    block_punctuation_frac: float
    """Share of punctuation among the tokens of all complete blocks."""
    distance_frac: tuple[float, ...]
    """Share of chosen blocks in each bucket of distance."""

    @classmethod
    def of(cls, sums: Tensor) -> SelectionShape:
        """Return the shares of sums [NUM_COLUMNS]."""
        x = dict(zip(_COLUMNS, sums.tolist(), strict=False))

        def share(part: float, whole: float) -> float:
            return part / whole if whole > 0 else math.nan

        return cls(
            share(x["punctuation"], x["chosen"]),
            share(x["distance"], x["chosen"]),
            share(x["kept_by_neighbour"], x["of_neighbour"]),
            share(x["entropy"], x["entropies"]),
            share(x["block_punctuation"], x["blocks"]),
            tuple(share(n, x["chosen"]) for n in sums[len(_COLUMNS) :].tolist()),
        )


@torch.no_grad()
def shape_sums(ids: Tensor, q_pos: Tensor, q_doc: Tensor, side_info: SideInfo, max_rows: int) -> Tensor:
    """Return fp64 [NUM_COLUMNS], sums over the queries of one micro-batch and layer.

    Args:
        ids: int32 [Tq, Hsel, k], chosen blocks of the query's document, -1 for none.
        q_pos: int [Tq], position of each query in its document.
        q_doc: int [Tq], its document.
        side_info: of the micro-batch.
        max_rows: pairs of neighbours that are compared at most.
    """
    settings, m = side_info.attention, side_info.attention.block_tokens
    bounds = side_info.cu_seqlens.long()
    lengths = bounds[1:] - bounds[:-1]
    sparse = lengths > settings.dense_len_tokens
    chosen = (ids >= 0) & sparse[q_doc][:, None, None]
    marks = torch.nn.functional.pad(side_info.is_punctuation.reshape(-1).long().cumsum(0), (1, 0))
    first = bounds[:-1][q_doc][:, None, None] + ids.clamp(min=0).long() * m
    # Where nothing is chosen the end may lie behind the last token: of a last document below one block.
    end = (first + m).clamp(max=len(marks) - 1)
    punctuation = (marks[end] - marks[first])[chosen].double().sum() / m
    distance = ((q_pos.long() // m)[:, None, None] - ids)[chosen]
    buckets = distance.clamp(min=1).double().log2().floor().long().clamp(max=NUM_DISTANCES - 1)
    kept, wanted = _neighbours(ids, chosen, q_pos, q_doc, max_rows)
    entropy, num_entropies = _entropy(first, chosen, lengths, side_info)
    complete = lengths * sparse // m
    inside = marks[bounds[:-1] + complete * m] - marks[bounds[:-1]]
    sums = [chosen.sum(), punctuation, distance.sum(), kept, wanted, entropy, num_entropies]
    sums += [inside.sum() / m, complete.sum()]
    histogram = torch.bincount(buckets, minlength=NUM_DISTANCES).double()
    return torch.cat([torch.stack([x.double() for x in sums]), histogram])


def _neighbours(
    ids: Tensor, chosen: Tensor, q_pos: Tensor, q_doc: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Return how many chosen blocks of sampled queries their predecessors chose too, and how many in all."""
    follows = (q_doc[1:] == q_doc[:-1]) & (q_pos[1:] == q_pos[:-1] + 1)
    both = chosen[1:].any(-1).all(-1) & chosen[:-1].any(-1).all(-1) & follows
    rows = both.nonzero().flatten() + 1
    if len(rows) > max_rows:
        rows = rows[torch.linspace(0, len(rows) - 1, max_rows, device=rows.device).long()]
    same = (ids[rows][..., :, None] == ids[rows - 1][..., None, :]) & chosen[rows][..., None]
    return same.any(-1).sum(), chosen[rows].sum()


def _entropy(first: Tensor, chosen: Tensor, lengths: Tensor, side_info: SideInfo) -> tuple[Tensor, Tensor]:
    """Return relative entropies summed over (document, head), and how many of those there are.

    Of a document whose blocks were chosen c_b times, N in all: log N - sum c_b log c_b / N, over the log of
    its number of candidates.
    """
    settings, num_heads = side_info.attention, first.shape[1]
    m, num_tokens = settings.block_tokens, side_info.token_ids.numel()
    windows = settings.init_tokens // m + settings.local_tokens // m - 1
    candidates = ((lengths - 1) // m - windows).clamp(min=0)
    head = torch.arange(num_heads, device=first.device)[:, None] * num_tokens
    counts = torch.bincount((first + head)[chosen], minlength=num_heads * num_tokens)
    counts = counts.view(num_heads, num_tokens).double()
    _, document = side_info.positions()
    by_document = counts.new_zeros(num_heads, len(lengths))
    total = by_document.index_add(1, document.long(), counts)
    weighted = by_document.index_add(1, document.long(), counts * counts.clamp(min=1).log())
    entropy = total.clamp(min=1).log() - weighted / total.clamp(min=1)
    relative = entropy / candidates.clamp(min=2).double().log()
    counted = (total > 0) & (candidates > 1)
    return (relative * counted).sum(), counted.sum()
