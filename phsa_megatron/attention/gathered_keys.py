"""The gather of all keys and values and the way back of their gradients, with as few copies as order allows.

Attention reads keys in natural order; collectives know the order of processes. With one row a sequence on one
level of processes every process's chunks are gathered straight to where they belong and gradients leave from
where the kernels wrote them. What stays is zigzag's second half, whose chunks processes own in reverse order:
half of all keys and values are copied forward, half of their gradients backward. Contiguous sharding copies
nothing. With several rows (more collectives) and over nodes (another order) everything passes through memory
in the order of processes, one copy each way. `config/context_copies.py` counts these bytes for the plan.

Letters: b rows of S tokens, CP processes, c = S / (2 CP) tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.config.schema import ContextSharding
from phsa_megatron.config.sequence_chunks import own_chunks
from phsa_megatron.parallel.exchange import (
    ContextGroups,
    Gathering,
    Landing,
    LandingGathering,
    reduce_scatter,
    reduce_scatter_from,
    start_all_gather,
    start_all_gather_to,
)


@dataclass(frozen=True)
class KeyOrder:
    """Where the chunks of all processes lie among the keys of `num_rows` x `seq_len_tokens` tokens."""

    groups: ContextGroups
    num_rows: int
    seq_len_tokens: int
    sharding: ContextSharding

    def start(self, key: Tensor, value: Tensor) -> Gathering | LandingGathering:
        """Start to gather keys and values [b * S / CP, Hkv, D] of all processes."""
        own = (key.detach(), value.detach())
        if not self._lands_in_order():
            return start_all_gather(torch.stack(own), self.groups)

        def landing() -> Landing:
            both = [x.new_empty(self.seq_len_tokens, *x.shape[1:]) for x in own]
            turned = self._turned(both)
            return Landing((*both, *turned), self._parts(both, turned))

        return start_all_gather_to(self._pieces(own), landing, self.groups)

    def finish(
        self, key: Tensor, value: Tensor, gathering: Gathering | LandingGathering
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values [b * S, Hkv, D] in natural order, contiguous.

        Differentiable: the gradients of `key` and `value` [b * S / CP, Hkv, D] are sums over all processes.
        """
        both: tuple[Tensor, Tensor] = _FinishGather.apply(  # type: ignore[no-untyped-call]
            key, value, gathering, self
        )
        return both

    def natural(self, gathering: Gathering | LandingGathering) -> tuple[Tensor, Tensor]:
        """Return keys and values in natural order, once they are here."""
        if isinstance(gathering, LandingGathering):
            gathering.work.wait()
            keys, values, *turned = gathering.landing.whole
            self._turn(turned, [_second_half(keys), _second_half(values)])
            return keys, values
        parts = gathering.parts()
        tokens = self.num_rows * self.seq_len_tokens
        keys, values = (parts[0].new_empty(tokens, *parts[0].shape[2:]) for _ in range(2))
        _copy_all([
            (chunk, parts[rank][which][at])
            for which, x in enumerate((keys, values))
            for rank, at, chunk in self._places(x)
        ])  # fmt: skip
        return keys, values

    def scatter_sums(self, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of own keys and values [b * S / CP, Hkv, D], summed over processes.

        Args:
            grad_keys: this process's share for all keys [b * S, Hkv, D] in natural order, contiguous.
            grad_values: the same for values.
        """
        both, size = [grad_keys, grad_values], self.groups.size()
        if not self._lands_in_order():
            parts = grad_keys.new_empty(size, 2, len(grad_keys) // size, *grad_keys.shape[1:])
            _copy_all([
                (parts[rank, which][at], chunk)
                for which, x in enumerate(both)
                for rank, at, chunk in self._places(x)
            ])  # fmt: skip
            own = reduce_scatter(parts, self.groups)
            return own[0], own[1]
        turned = self._turned(both)
        self._turn([_second_half(x) for x in both], turned)
        sums = (
            grad_keys.new_empty(len(grad_keys) // size, *grad_keys.shape[1:]),
            grad_values.new_empty(len(grad_values) // size, *grad_values.shape[1:]),
        )
        reduce_scatter_from(self._parts(both, turned), self._pieces(sums), self.groups)
        return sums

    def _lands_in_order(self) -> bool:
        """Return whether chunks travel to and from their places among all keys."""
        return self.num_rows == 1 and len(self.groups.levels()) == 1

    def _turns(self) -> bool:
        """Return whether own second chunks lie in the reverse order of processes."""
        return self.sharding == ContextSharding.zigzag

    def _pieces(self, own: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return what one process has of keys and values [S / CP, Hkv, D], as `_parts` has it of all."""
        return tuple(piece for x in own for piece in (x.chunk(2) if self._turns() else [x]))

    def _parts(self, both: list[Tensor], turned: list[Tensor]) -> tuple[Tensor, ...]:
        """Return [CP, ...] for each of `_pieces`: parts of keys and values [S, Hkv, D], or of `turned`."""
        halves = both
        if turned:
            firsts = [x[: len(x) // 2] for x in both]
            halves = [half for pair in zip(firsts, turned, strict=True) for half in pair]
        size = self.groups.size()
        return tuple(half.view(size, len(half) // size, *half.shape[1:]) for half in halves)

    def _turned(self, both: list[Tensor]) -> list[Tensor]:
        """Return memory for second halves in the order of processes, nothing if that is natural order."""
        return [torch.empty_like(_second_half(x)) for x in both] if self._turns() else []

    def _turn(self, sources: list[Tensor], targets: list[Tensor]) -> None:
        """Copy the chunks of each source [S / 2, Hkv, D] to its target, the last one first."""
        if self._turns():
            _copy_all([
                pair
                for x, y in zip(targets, sources, strict=True)
                for pair in zip(self._chunks(x), reversed(self._chunks(y)), strict=True)
            ])  # fmt: skip

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        c = self.seq_len_tokens // (2 * self.groups.size())
        return x.view(len(x) // c, c, *x.shape[1:]).unbind(0)

    def _places(self, x: Tensor) -> list[tuple[int, slice, Tensor]]:
        """Return every chunk of x [b * S, Hkv, D] with the process that owns it and its place there."""
        chunks, size = self._chunks(x), self.groups.size()
        c = len(chunks[0])
        return [
            (rank, slice((row * 2 + place) * c, (row * 2 + place + 1) * c), chunks[row * 2 * size + number])
            for row in range(self.num_rows)
            for rank in range(size)
            for place, number in enumerate(own_chunks(size, rank, self.sharding))
        ]


class _FinishGather(torch.autograd.Function):
    """Waits for keys and values; backward returns each process the gradients of its own."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, gathering: Gathering | LandingGathering, order: KeyOrder
    ) -> tuple[Tensor, Tensor]:
        ctx.order = order
        return order.natural(gathering)

    @staticmethod
    def backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor, Tensor, None, None]:
        order: KeyOrder = ctx.order
        return *order.scatter_sums(grad_keys.contiguous(), grad_values.contiguous()), None, None


def _second_half(x: Tensor) -> Tensor:
    return x[len(x) // 2 :]


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor over the first, all contiguous: on a GPU in one kernel of wide loads."""
    targets, sources = zip(*pairs, strict=True)
    torch._foreach_copy_(list(targets), list(sources))
