"""Attention whose queries, keys and values lie on several processes, exact to the bit of the selection.

Each process owns two chunks of every row (`parallel/sequence_sharding.py`) and computes the output of its own
queries:

1. The first m - 1 keys of every chunk are gathered: a document may start at any token, so that a block may
   begin in one chunk and end in the next. A block belongs to the process that has its first token.
2. Every process pools its own blocks, over the same keys in the same order as a single process would, and
   the pooled keys (1/m of the keys) are gathered.
3. The gather of all keys and values is started, and runs while the own queries score all blocks and select.
4. The own queries attend over all keys, in natural order. Backward sums the gradients of keys and values
   over processes and leaves each process its own (reduce-scatter, in the dtype of the keys).

With `parallel.context_exchange=block_sparse` the blocks that own queries attend to take the place of all keys
in 3 and 4 (`block_exchange.py`): they are known and sent after selection. `auto` chooses, layer by layer,
what is fewer bytes. Keys are the same bit for bit in all modes.

No gradient flows through 1 and 2. But for the exchanged blocks all shapes follow from the settings; nothing
depends on where documents start. Letters as in `core_attention.py`; c = S / (2 * CP) tokens of a chunk, m
tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from phsa_kernels.api import pool
from phsa_megatron.attention.block_exchange import BlockExchange, BlockMap
from phsa_megatron.attention.gathered_keys import KeyOrder
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, ContextExchange, ContextSharding
from phsa_megatron.config.sequence_chunks import own_chunks
from phsa_megatron.parallel.exchange import ContextGroups, Gathering, LandingGathering, start_all_gather
from phsa_megatron.parallel.sequence_sharding import natural_order, own_positions


@cache
def _on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a constant that nobody writes to.

    Copied once in a process: a copy from the host's ordinary memory waits for the device, and no CUDA graph
    can hold it.
    """
    return torch.tensor(numbers, dtype=dtype, device=device)


@dataclass(frozen=True)
class BlockOwners:
    """Where the complete blocks of a micro-batch lie: the same for all layers, computed once."""

    own_tokens: Tensor
    """int64 [own slots * m]: for each of this process's block slots, its tokens' places among the process's
    own tokens [b, 2, c] flattened, followed by the boundary keys [b, 2, m - 1] flattened."""
    own_weights: Tensor
    """fp32 [own slots * m]: pooling weights of those tokens; 0 in slots without a block."""
    slot_of_block: Tensor
    """int64 [NB]: the place of each block, in natural order, among the slots of all processes."""
    is_block: Tensor
    """bool [NB]: False past the last complete block."""
    own_boundaries: Tensor
    """int32 [2]: the slots' tokens as one document, for the pooling op."""
    following: Tensor
    """int64 [2]: the place, among the chunks of all processes, of the chunk after each of the own two."""


@dataclass(frozen=True)
class DocumentPiece:
    """Consecutive own queries of one document, and the keys from the document's start to the last of them."""

    own_start: int
    """Among the own tokens [b * S / CP]."""
    own_end: int
    keys_start: int
    """Among all tokens [b * S]."""
    keys_end: int


@dataclass(frozen=True)
class ContextShard:
    """This process's part of every row of a micro-batch of `num_rows` x `seq_len_tokens`."""

    groups: ContextGroups
    num_rows: int
    seq_len_tokens: int
    sharding: ContextSharding = ContextSharding.zigzag
    exchange: ContextExchange = ContextExchange.all_gather

    @property
    def key_order(self) -> KeyOrder:
        """Return where the keys of all processes lie, and how they get there."""
        return KeyOrder(self.groups, self.num_rows, self.seq_len_tokens, self.sharding)

    @property
    def chunk_tokens(self) -> int:
        """Return c."""
        return self.seq_len_tokens // (2 * self.groups.size())

    def own_chunks(self, rank: int) -> tuple[int, int]:
        """Return the chunks of a row that process `rank` owns."""
        return own_chunks(self.groups.size(), rank, self.sharding)

    def tokens(self, side_info: SideInfo) -> Tensor:
        """Return int64 [b * S / CP]: this process's tokens among the b * S of the micro-batch, ascending."""
        return self._tokens_of_all(side_info)[self.groups.rank()]

    def _tokens_of_all(self, side_info: SideInfo) -> Tensor:
        """Return int64 [CP, b * S / CP]: the tokens of every process."""

        def compute() -> Tensor:
            size, device = self.groups.size(), side_info.token_ids.device
            own = [own_positions(self.seq_len_tokens, size, r, self.sharding, device) for r in range(size)]
            row = torch.arange(self.num_rows, device=device) * self.seq_len_tokens
            return (row[:, None] + torch.stack(own)[:, None]).flatten(1)

        return side_info.once("context_tokens", compute)

    def document_pieces(self, side_info: SideInfo) -> list[DocumentPiece]:
        """Return the pieces of documents that this process's chunks hold; together they are its tokens.

        On a GPU the first call of a micro-batch waits for the device, as `SideInfo.document_bounds` does.
        """

        def cut() -> list[DocumentPiece]:
            size, c = self.groups.size(), self.chunk_tokens
            numbers = [
                row * 2 * size + number
                for row in range(self.num_rows)
                for number in self.own_chunks(self.groups.rank())
            ]
            pieces = []
            for place, number in enumerate(numbers):
                for start, end in side_info.document_bounds():
                    first, last = max(start, number * c), min(end, (number + 1) * c)
                    if first < last:
                        to_own = (place - number) * c
                        pieces.append(DocumentPiece(first + to_own, last + to_own, start, last))
            return pieces

        return side_info.once("document_pieces", cut)

    def by_chunk(self, x: Tensor) -> Tensor:
        """Return [b, 2, c, H, D] of this process's [b * S / CP, H, D]."""
        return x.view(self.num_rows, 2, self.chunk_tokens, *x.shape[1:])

    def gather_pooled(self, key: Tensor, side_info: SideInfo, settings: AttentionConfig) -> Tensor:
        """Return the pooled keys of all blocks [NB, Hkv, 1, D], equal to those of a single process.

        Args:
            key: this process's keys [b * S / CP, Hkv, D], without gradient.
            side_info: of the whole micro-batch.
            settings: the block size and the implementation are read.
        """
        m = settings.block_tokens
        owners: BlockOwners = side_info.once("block_owners", lambda: self._block_owners(side_info, m))
        keys = torch.cat([key, self._boundary_keys(key, m, owners.following)]) if m > 1 else key
        own = pool(
            keys.index_select(0, owners.own_tokens),
            owners.own_weights,
            owners.own_boundaries,
            block_tokens=m,
            impl=settings.impl.value,
        )
        slots = start_all_gather(own, self.groups).joined().flatten(0, 1)
        pooled = slots.index_select(0, owners.slot_of_block)
        return pooled.masked_fill_(~owners.is_block[:, None, None, None], 0.0)

    def start_keys_and_values(self, key: Tensor, value: Tensor) -> Gathering | LandingGathering | None:
        """Start to gather keys and values [b * S / CP, Hkv, D] of all, if it is sure that all go."""
        if self.exchange != ContextExchange.all_gather:
            return None
        return self.key_order.start(key, value)

    def keys_and_values(
        self,
        key: Tensor,
        value: Tensor,
        gathering: Gathering | LandingGathering | None,
        ids: Tensor | None,
        side_info: SideInfo,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values that own queries attend to, and where their blocks lie.

        Either all [b * S, Hkv, D] in natural order and None, or needed blocks [slots * m, Hkv, D] and
        `block_slot` as `phsa_kernels.attend` takes it. Differentiable: the gradients of `key` and `value` are
        sums over all processes.

        Args:
            key: this process's keys [b * S / CP, Hkv, D].
            value: its values.
            gathering: what `start_keys_and_values` returned.
            ids: int32 [b * S / CP, Hkv, k], what the own queries selected; None if they attend to everything.
            side_info: of the whole micro-batch.
        """
        if gathering is None and ids is not None:
            settings, tokens = side_info.attention, self._tokens_of_all(side_info)
            blocks: BlockMap = side_info.once(
                "block_map", lambda: BlockMap.build(side_info, tokens, self.groups.rank(), settings)
            )
            sparse = BlockExchange(self.groups, blocks, ids)
            if self.exchange == ContextExchange.block_sparse or sparse.sends_less():
                plan = sparse.plan()
                return *plan.fetch(key, value, blocks.block_tokens), plan.block_slot
        if gathering is None:
            gathering = self.key_order.start(key, value)
        return *self.key_order.finish(key, value, gathering), None

    def _boundary_keys(self, key: Tensor, m: int, following: Tensor) -> Tensor:
        """Return [b * 2 * (m - 1), Hkv, D]: the keys that follow each of this process's chunks.

        After the last chunk of a row nothing follows; what stands there is never read.
        """
        starts = self.by_chunk(key)[:, :, : m - 1]  # [b, 2, m - 1, Hkv, D]
        chunks = torch.cat(start_all_gather(starts, self.groups).parts(), dim=1)  # [b, CP * 2, m - 1, Hkv, D]
        return chunks.index_select(1, following).reshape(-1, *key.shape[1:])

    def _block_owners(self, side_info: SideInfo, m: int) -> BlockOwners:
        """Return where blocks lie. A chunk of c tokens, a multiple of m, has c / m slots for its blocks."""
        position, document = (x.long() for x in side_info.positions())
        num_tokens, c, size = len(position), self.chunk_tokens, self.groups.size()
        num_blocks, slots = num_tokens // m, c // m
        device = position.device
        complete = ((side_info.cu_seqlens[1:] - side_info.cu_seqlens[:-1]) // m)[document]
        starts_block = (position % m == 0) & (position // m < complete)
        # Blocks are numbered by their first token: documents in order, and blocks in order in each.
        number = starts_block.long().cumsum(0) - 1
        token = torch.arange(num_tokens, device=device)
        first = torch.full((num_blocks + 1,), num_tokens, device=device)
        first = first.scatter(0, torch.where(starts_block, number, num_blocks), token)
        # The last entry collects the tokens that start no block; what follows must not take it for one.
        first[num_blocks] = num_tokens
        is_block = first[:-1] < num_tokens
        before = torch.searchsorted(first[:-1], torch.arange(0, num_tokens, c, device=device))

        chunk = first[:-1].clamp(max=num_tokens - 1) // c  # over all rows
        row, number_in_row = chunk // (2 * size), chunk % (2 * size)
        slot = torch.arange(num_blocks, device=device) - before[chunk]
        # Slots are gathered as [CP, b, 2, c / m].
        places = _on_device(tuple(natural_order(size, self.sharding)), torch.int64, device)
        place = places[number_in_row]
        gathered = ((place // 2 * self.num_rows + row) * 2 + place % 2) * slots + slot
        own = self._own_slots(first, before, m)
        safe = own.clamp(max=num_tokens - 1)
        weights = side_info.pool_weights.reshape(-1)[safe]
        after = tuple(min(n + 1, 2 * size - 1) for n in self.own_chunks(self.groups.rank()))
        return BlockOwners(
            own_tokens=self._place_of_own(safe, own < num_tokens, m),
            own_weights=torch.where(own < num_tokens, weights, 0.0).flatten(),
            slot_of_block=torch.where(is_block, gathered, 0),
            is_block=is_block,
            own_boundaries=_on_device((0, own.numel()), torch.int32, device),
            following=places[_on_device(after, torch.int64, device)],
        )

    def _own_slots(self, first: Tensor, before: Tensor, m: int) -> Tensor:
        """Return int64 [b * 2, c / m, m]: the tokens of this process's block slots; b * S where no block is.

        Args:
            first: int64 [NB + 1], the first token of each block, b * S for none.
            before: int64 [b * 2 * CP], blocks that start before each chunk.
            m: tokens of a block.
        """
        size, num_tokens = self.groups.size(), self.num_rows * self.seq_len_tokens
        device = first.device
        row = torch.arange(self.num_rows, device=device)[:, None] * 2 * size
        own_chunks = _on_device(self.own_chunks(self.groups.rank()), torch.int64, device)
        chunks = (row + own_chunks).flatten()
        after = torch.cat([before[1:], before.new_full((1,), len(first))])
        block = before[chunks][:, None] + torch.arange(self.chunk_tokens // m, device=device)
        start = first[block.clamp(max=len(first) - 1)]
        exists = (block < after[chunks][:, None]) & (start < num_tokens)
        tokens = start[..., None] + torch.arange(m, device=device)
        return torch.where(exists[..., None], tokens, num_tokens)

    def _place_of_own(self, tokens: Tensor, exists: Tensor, m: int) -> Tensor:
        """Return, flattened, where `tokens` [b * 2, c / m, m] of own slots lie; 0 where no block is.

        That is among the own tokens [b, 2, c] followed by the boundary keys [b, 2, m - 1].
        """
        c, num_chunks = self.chunk_tokens, len(tokens)
        own_chunk = torch.arange(num_chunks, device=tokens.device)[:, None, None]
        # A block's first token is in the chunk; its offset tells which of its tokens are beyond the end.
        offset = tokens % c
        first_offset = offset[..., :1]
        inside = offset >= first_offset
        place = torch.where(inside, own_chunk * c + offset, num_chunks * c + own_chunk * (m - 1) + offset)
        return torch.where(exists, place, 0).flatten()
