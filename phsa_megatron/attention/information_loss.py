"""What selection loses: the dense attention mass outside of the attended keys, against the best choice.

For sampled queries the full causal softmax is computed, and cut into blocks. An oracle that knows it takes
the k candidate blocks with the most mass, summed over the heads that share a selection: the same budget as
the selector's. Everything is kept as sums per layer and head, so that sums of processes add up.

    kept    mass of init, local and the chosen blocks
    window  mass of init and local alone
    oracle  mass of init, local and the oracle's blocks
    recall  chosen blocks that the oracle has too, over the oracle's blocks
    gain    (kept - window) / (oracle - window): the share of what selection could add that it adds

recall and gain are over queries that have more candidates than k: elsewhere there is nothing to choose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig

COLUMNS = (
    "rows",
    "kept",
    "window",
    "oracle",
    "kept_choice",
    "window_choice",
    "oracle_choice",
    "hits",
    "wanted",
)


@dataclass(frozen=True)
class Information:
    """Shares over the sampled queries of some heads; nan where there was none with a choice."""

    kept_mass_frac: float
    window_mass_frac: float
    oracle_mass_frac: float
    block_recall_frac: float
    oracle_gain_frac: float

    @classmethod
    def of(cls, sums: Tensor) -> Information:
        """Return the shares of sums [9], in the order of COLUMNS."""
        x = dict(zip(COLUMNS, sums.tolist(), strict=True))
        possible = x["oracle_choice"] - x["window_choice"]
        return cls(
            kept_mass_frac=_share(x["kept"], x["rows"]),
            window_mass_frac=_share(x["window"], x["rows"]),
            oracle_mass_frac=_share(x["oracle"], x["rows"]),
            block_recall_frac=_share(x["hits"], x["wanted"]),
            oracle_gain_frac=_share(x["kept_choice"] - x["window_choice"], possible),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def block_mass(
    query: Tensor,
    keys: Tensor,
    position: Tensor,
    attention: AttentionConfig,
    softmax_scale: float | None = None,
    last_position: int | None = None,
) -> Tensor:
    """Return fp32 [n, Hq, blocks]: the full causal softmax of each query, summed over each block's keys.

    Args:
        query: [n, Hq, D] after RoPE.
        keys: [document's tokens, Hkv, D] after RoPE.
        position: int [n] in the document.
        attention: windows and block size.
        softmax_scale: None is D ** -0.5.
        last_position: the largest of `position`; None asks the device, and waits for it.
    """
    n, num_heads, head_dim = query.shape
    m = attention.block_tokens
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    num_keys = (int(position.max()) if last_position is None else last_position) + 1
    keys = keys[:num_keys].float()
    grouped = query.float().view(n, keys.shape[1], -1, head_dim)
    scores = torch.einsum("nhrd,khd->nhrk", grouped, keys).flatten(1, 2) * scale
    future = torch.arange(num_keys, device=keys.device) > position[:, None]
    mass = scores.masked_fill(future[:, None], -math.inf).softmax(-1)
    padded = torch.nn.functional.pad(mass, (0, -num_keys % m))
    return padded.view(n, num_heads, -1, m).sum(-1)


def information_of_mass(mass: Tensor, ids: Tensor, position: Tensor, attention: AttentionConfig) -> Tensor:
    """Return fp64 [Hq, 9], sums over queries of any documents.

    Args:
        mass: fp32 [n, Hq, blocks], of `block_mass`.
        ids: int32 [n, Hkv or Hq, k], the chosen blocks.
        position: int [n] in the document.
        attention: windows and block size.
    """
    n, num_heads, num_blocks = mass.shape
    m, topk = attention.block_tokens, ids.shape[2]
    block = torch.arange(num_blocks, device=mass.device)
    current = (position.long() // m)[:, None]
    in_window = (block < attention.init_tokens // m) | (block > current - attention.local_tokens // m)
    candidate = ~in_window & (block < current)
    window = (mass * in_window[:, None]).sum(-1)  # [n, Hq]
    chosen = block_flags(ids, num_blocks)  # [n, Hsel, blocks]
    per_selection = num_heads // ids.shape[1]
    shared = mass.view(n, ids.shape[1], per_selection, num_blocks).sum(2)
    width = min(topk, num_blocks)
    best = shared.masked_fill(~candidate[:, None], -1.0).topk(width, dim=-1)
    best_ids = torch.where(best.values >= 0, best.indices, -1)
    oracle = block_flags(best_ids, num_blocks)

    def with_blocks(flags: Tensor) -> Tensor:
        return window + (mass * flags.repeat_interleave(per_selection, 1)).sum(-1)

    kept, ideal = with_blocks(chosen), with_blocks(oracle)
    choice = (candidate.sum(-1) > topk).double()[:, None].expand(n, num_heads)
    hits = (chosen & oracle).sum(-1).repeat_interleave(per_selection, 1)
    wanted = oracle.sum(-1).repeat_interleave(per_selection, 1)
    columns = [torch.ones_like(choice), kept, window, ideal]
    columns += [x * choice for x in (kept, window, ideal, hits, wanted)]
    return torch.stack([x.double().sum(0) for x in columns], dim=-1)


def block_flags(ids: Tensor, num_blocks: int) -> Tensor:
    """Return bool [n, Hsel, blocks] of block ids [n, Hsel, k], -1 for none."""
    flags = torch.zeros(*ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=ids.device)
    flags.scatter_(2, torch.where(ids < 0, num_blocks, ids.long()), True)
    return flags[..., :-1]


def _sums_of_rows(
    query: Tensor, key: Tensor, ids: Tensor, position: Tensor, document: Tensor, side_info: SideInfo
) -> Tensor | None:
    """Return fp64 [Hq, 9], sums over sampled queries of any documents; None where nothing is selected.

    Each document has its own softmax; all else is computed for all rows at once, so that many short documents
    do not cost the host a hundred launches and several waits each.
    """
    attention = side_info.attention
    bounds = side_info.once("host_cu_seqlens", lambda: side_info.cu_seqlens).tolist()
    positions, documents = torch.stack([position, document]).tolist()
    kept: list[int] = []
    masses: list[Tensor] = []
    for number, group in groupby(range(len(documents)), key=documents.__getitem__):
        own = list(group)
        start, end = bounds[number], bounds[number + 1]
        if end - start <= attention.dense_len_tokens:
            continue  # attended densely: nothing is selected there
        here = slice(own[0], own[-1] + 1)
        last = max(positions[here])
        masses.append(block_mass(query[here], key[start:end], position[here], attention, last_position=last))
        kept += own
    if not masses:
        return None
    mass = query.new_zeros((len(kept), query.shape[1], max(m.shape[2] for m in masses)), dtype=torch.float32)
    first = 0
    for part in masses:
        # Blocks past a row's own are no candidates and have no mass.
        mass[first : first + len(part), :, : part.shape[2]] = part
        first += len(part)
    if len(kept) < len(documents):
        chosen = torch.tensor(kept, device=ids.device)
        ids, position = ids[chosen], position[chosen]
    return information_of_mass(mass, ids, position, attention)


class InformationRecorder:
    """Sums up information loss over the layers and micro-batches that it rides on; see `SideInfo.recorder`.

    Attributes:
        sums: fp64 [layers, Hq of the whole model, 9] on the CPU; what this process does not have stays 0.
    """

    def __init__(self, num_layers: int, num_heads: int, first_head: int = 0, max_rows: int = 32) -> None:
        """Make an empty recorder.

        Args:
            num_layers: of the main stack, over all pipeline stages.
            num_heads: query heads, over all tensor-parallel processes.
            first_head: the first of this process's heads.
            max_rows: queries looked at per layer and micro-batch, evenly spaced over its tokens.
        """
        self.sums = torch.zeros(num_layers, num_heads, len(COLUMNS), dtype=torch.float64)
        self.first_head = first_head
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
        """Add one layer's selection of one micro-batch; the arguments are those of `SelectionRecorder`.

        Raises:
            ValueError: the keys are not all here (`block_slot`); `config/parallel_rules.py` refuses that.
        """
        if block_slot is not None:
            raise ValueError("information loss compares with dense attention and needs all keys, not slots")
        position, document = side_info.positions()
        num_tokens = len(key)
        sample = torch.linspace(0, num_tokens - 1, min(num_tokens, self.max_rows), device=query.device).long()
        if tokens is None:
            rows = sample
        else:
            rows = torch.isin(tokens, sample).nonzero().flatten()
            sample = tokens[rows]
        heads = slice(self.first_head, self.first_head + query.shape[1])
        found = _sums_of_rows(query[rows], key, ids[rows], position[sample], document[sample], side_info)
        if found is not None:
            self.sums[layer_number - 1, heads] += found.cpu()

    def layers(self, sums: Tensor | None = None) -> dict[int, Information]:
        """Return the shares by layer number, over all its heads; layers without a record are left out.

        Args:
            sums: `self.sums` added up over processes; None takes those of this process.
        """
        table = (self.sums if sums is None else sums.cpu()).sum(1)
        return {number: Information.of(row) for number, row in enumerate(table, start=1) if row[0] > 0}

    def total(self, sums: Tensor | None = None) -> Information:
        """Return the shares over all layers and heads."""
        return Information.of((self.sums if sums is None else sums.cpu()).sum((0, 1)))
