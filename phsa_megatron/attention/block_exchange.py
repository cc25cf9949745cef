"""The block-sparse exchange: a process gets the keys and values of the blocks that its own queries attend to.

Those are the selected blocks, and the init and local windows (whole documents where attention is dense). Each
process marks the blocks that it needs, one byte a block, and the marks are gathered: then all processes know
what every one sends to every other, and nobody has to ask. How much is sent depends on the data, so that the
host has to wait for the device once a layer.

Blocks are counted as `phsa_kernels.attend` counts them: all blocks of all documents in order, incomplete last
blocks included. A block's tokens may lie on two processes; each sends the tokens that it owns. Letters: T
tokens of all rows, CP processes, m tokens of a block, NB = T / m + N rows for blocks, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.parallel.exchange import ContextGroups, Route, send_rows, start_all_gather


@dataclass(frozen=True)
class BlockMap:
    """Where blocks and their tokens lie: the same for all layers of a micro-batch."""

    block_tokens: int
    """m."""
    block_of_token: Tensor
    """int64 [T]."""
    offset_of_token: Tensor
    """int64 [T]: its place in its block."""
    first_block: Tensor
    """int64 [N]: of each document."""
    own_q_doc: Tensor
    """int64 [T / CP]: document of each own query."""
    tokens: Tensor
    """int64 [CP, T / CP]: the tokens of each process, in the order in which it holds them."""
    windows: Tensor
    """bool [NB]: blocks that own queries attend to whatever they select."""
    held: Tensor
    """fp64 [CP, NB]: how many tokens of each block each process owns. Counts, exact in fp64."""

    @classmethod
    def build(cls, side_info: SideInfo, tokens: Tensor, rank: int, settings: AttentionConfig) -> BlockMap:
        """Return the map of a micro-batch.

        Args:
            side_info: of whole sequences.
            tokens: int64 [CP, T / CP], the tokens of each process.
            rank: of this process, among CP.
            settings: block size, windows and dense_len_tokens are read.
        """
        m = settings.block_tokens
        position, document = (x.long() for x in side_info.positions())
        lengths = (side_info.cu_seqlens[1:] - side_info.cu_seqlens[:-1]).long()
        num_blocks = len(position) // m + len(lengths)
        blocks_of_document = (lengths + m - 1) // m
        first_block = blocks_of_document.cumsum(0) - blocks_of_document
        block_of_token = first_block[document] + position // m
        held = torch.zeros(len(tokens), num_blocks, dtype=torch.float64, device=tokens.device)
        held.scatter_add_(1, block_of_token[tokens], torch.ones_like(tokens, dtype=torch.float64))
        own = torch.zeros(num_blocks, dtype=torch.bool, device=tokens.device)
        own[block_of_token[tokens[rank]]] = True
        document_of_block = torch.searchsorted(
            blocks_of_document.cumsum(0), torch.arange(num_blocks, device=tokens.device), right=True
        ).clamp(max=len(lengths) - 1)
        return cls(
            block_tokens=m,
            block_of_token=block_of_token,
            offset_of_token=position % m,
            first_block=first_block,
            own_q_doc=document[tokens[rank]],
            tokens=tokens,
            windows=_windows(own, first_block[document_of_block], document_of_block, lengths, settings),
            held=held,
        )

    def needed(self, ids: Tensor) -> Tensor:
        """Return bool [NB]: blocks that own queries attend to, having selected `ids` int32 [Tq, Hkv, k]."""
        chosen = self.first_block[self.own_q_doc][:, None, None] + ids
        # One entry past the end takes the -1 of "no block".
        marks = torch.zeros(len(self.windows) + 1, dtype=torch.bool, device=ids.device)
        marks[torch.where(ids < 0, len(self.windows), chosen).flatten()] = True
        return marks[:-1] | self.windows


def _windows(
    own: Tensor, first: Tensor, document: Tensor, lengths: Tensor, settings: AttentionConfig
) -> Tensor:
    """Return bool [NB]: blocks in the init or local window of an own query, or before it in a dense document.

    Args:
        own: bool [NB], blocks with own queries.
        first: int64 [NB], the first block of each block's document.
        document: int64 [NB].
        lengths: int64 [N], tokens of each document.
        settings: windows and dense_len_tokens are read.
    """
    m, marks = settings.block_tokens, own.clone()
    number = torch.arange(len(own), device=own.device)
    for back in range(1, min(settings.local_tokens // m, len(own))):
        inside = own[back:] & (number[back:] - back >= first[back:])
        marks[:-back] |= inside
    # The last block of each document with own queries: init windows and dense documents reach up to it.
    last = torch.full_like(lengths, -1).scatter_reduce(
        0, document, torch.where(own, number, -1), "amax", include_self=True
    )[document]
    dense = lengths[document] <= settings.dense_len_tokens
    always = dense | (number - first < settings.init_tokens // m)
    return marks | (always & (number <= last))


@dataclass(frozen=True)
class BlockPlan:
    """What is sent in one layer, and where it is put."""

    routes: tuple[Route, ...]
    """One for each level of `ContextGroups.levels()`."""
    rows: Tensor
    """int64 [received]: the place of each received token in the slots."""
    block_slot: Tensor
    """int32 [NB]: the slot of each block; -1 for blocks that are not here, which nobody reads."""
    num_slots: int
    """Blocks that this process needs."""

    def fetch(self, key: Tensor, value: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [slots * m, Hkv, D] of the needed blocks, from this process's own."""
        both = torch.stack([key, value], dim=1)
        for route in self.routes:
            both = send_rows(both, route)
        keys_and_values: tuple[Tensor, Tensor] = _IntoSlots.apply(  # type: ignore[no-untyped-call]
            both, self.rows, self.num_slots * block_tokens
        )
        return keys_and_values


class _IntoSlots(torch.autograd.Function):
    """Puts received tokens [n, 2, Hkv, D] in their rows: by reading, which takes one pass and not three."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, rows: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        ctx.rows = rows
        # Rows past the end of a last block are never read: they hold the first token, which is finite.
        source = rows.new_zeros(num_rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
        tokens = both.flatten(0, 1)
        return tokens.index_select(0, 2 * source), tokens.index_select(0, 2 * source + 1)

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, None, None]:
        grads = [grad.index_select(0, ctx.rows) for grad in (grad_keys, grad_values)]
        return torch.stack(grads, dim=1), None, None


class BlockExchange:
    """The marks of all processes in one layer, and what follows from them."""

    def __init__(self, groups: ContextGroups, blocks: BlockMap, ids: Tensor) -> None:
        """Gather what every process needs; `ids` are the blocks that the own queries selected."""
        self.groups, self.blocks = groups, blocks
        marks = blocks.needed(ids).to(torch.uint8)
        self.needs = start_all_gather(marks, groups).joined().bool()  # [CP, NB]

    def sends_less(self) -> bool:
        """Return whether blocks are fewer bytes than all keys, for the process that sends most.

        Over nodes only what crosses them counts. The answer is the same on all processes.
        """
        levels = self.groups.levels()
        needs = self.needs
        if len(levels) > 1:
            needs = needs.view(levels[0].size(), levels[1].size(), -1).any(1)
        counts = needs.double() @ self.blocks.held.T  # [nodes or processes, owners]
        places = torch.arange(self.groups.size(), device=needs.device) // (self.groups.size() // len(needs))
        to_others = counts.sum(0) - counts[places, torch.arange(len(places), device=needs.device)]
        return bool(to_others.max() < (len(needs) - 1) * self.blocks.tokens.shape[1])

    def plan(self) -> BlockPlan:
        """Return what is sent. On a GPU the host waits for the device here."""
        levels, rank = self.groups.levels(), self.groups.rank()
        needs, tokens = self.needs, self.blocks.tokens
        routes = []
        if len(levels) > 1:
            # What any process of a node needs goes to the one of this place there.
            num_nodes, node_size = levels[0].size(), levels[1].size()
            node, place = divmod(rank, node_size)
            by_node = needs.view(num_nodes, node_size, -1)
            column = tokens.view(num_nodes, node_size, -1)[:, place]
            routes.append(self._route(levels[0], by_node.any(1), tokens[rank], column))
            held = column.flatten()[by_node[node].any(0)[self.blocks.block_of_token[column.flatten()]]]
            needs, own_needs = by_node[node], needs[rank]
            # Process i of this node has the tokens of its place on all nodes, node after node.
            owners = tokens.view(num_nodes, node_size, -1).transpose(0, 1).flatten(1)
        else:
            held, owners, own_needs = tokens[rank], tokens, needs[rank]
        routes.append(self._route(levels[-1], needs, held, owners))
        received = owners.flatten()[own_needs[self.blocks.block_of_token[owners.flatten()]]]
        slot = torch.where(own_needs, own_needs.cumsum(0) - 1, -1)
        block = self.blocks.block_of_token[received]
        return BlockPlan(
            routes=tuple(routes),
            rows=slot[block] * self.blocks.block_tokens + self.blocks.offset_of_token[received],
            block_slot=slot.to(torch.int32),
            num_slots=int(own_needs.sum()),
        )

    def _route(self, group: object, needs: Tensor, held: Tensor, owners: Tensor) -> Route:
        """Return the route of one level.

        Args:
            group: of the level.
            needs: bool [P, NB], what each of its processes needs.
            held: int64 [n], the tokens that this process can send, in order.
            owners: int64 [P, n'], the tokens that each of its processes may send to this one, in order.
        """
        wanted = needs[:, self.blocks.block_of_token[held]]  # [P, n]
        coming = needs[group.rank()][self.blocks.block_of_token[owners]]  # type: ignore[attr-defined]
        sent, received = torch.stack([wanted.sum(1), coming.sum(1)]).tolist()
        rows = wanted.nonzero()[:, 1]
        return Route(self.groups, group, rows, tuple(sent), tuple(received))  # type: ignore[arg-type]
