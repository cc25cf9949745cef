"""Micro-batches with documents, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from phsa_megatron.attention import block_choice, context_parallel, core_attention
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch, TrainConfig
from phsa_megatron.model.norm import RMSNorm

TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)


@dataclass
class MicroBatch:
    """Tokens int64 [b, S] and document boundaries over b * S tokens."""

    tokens: Tensor
    cu_seqlens: Tensor

    @property
    def positions(self) -> Tensor:
        """int64 [b, S], counted in the row."""
        return torch.arange(self.tokens.shape[1]).expand_as(self.tokens)

    def side_info(self, config: TrainConfig, topk: int | None = None) -> SideInfo:
        """Returns the side information of this micro-batch."""
        topk = config.attention.train_topk if topk is None else topk
        return SideInfo.build(self.tokens, self.cu_seqlens, TABLE, config.attention, topk)


@pytest.fixture
def micro_batch() -> Callable[..., MicroBatch]:
    """Returns a builder of micro-batches with random tokens: `micro_batch([0, 20, 64], seed=1, rows=1)`."""

    def build(bounds: list[int], seed: int = 0, rows: int = 1) -> MicroBatch:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, 100, (rows, bounds[-1] // rows), generator=generator)
        return MicroBatch(tokens, torch.tensor(bounds, dtype=torch.int32))

    return build


class _KeepsItsInput(torch.autograd.Function):
    """Keeps what torch's RMSNorm keeps on a GPU: its input and one fp32 a row. On a CPU it is a chain of
    operations, which keep more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, torch.ones(x.shape[:-1]))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _KeepsWhatTheKernelsKeep(torch.autograd.Function):
    """Keeps tensors of the shapes that `phsa_kernels.ops._save` keeps (`attend/launch.py:saved_shapes`)."""

    @staticmethod
    def forward(ctx, q, k, v, topk):
        num_tokens, num_kv_heads = len(q), k.shape[1]
        out, lse = torch.zeros_like(q), torch.zeros(num_tokens, q.shape[1])
        ids = torch.zeros(num_tokens, num_kv_heads, topk, dtype=torch.int32)
        rows = torch.zeros(6, num_tokens, dtype=torch.int32)
        union = torch.zeros(num_tokens * num_kv_heads * topk * 2, dtype=torch.int32)
        ctx.save_for_backward(q, k, v, ids, out, lse, rows, union)
        ctx.shape = k.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), grad.new_zeros(ctx.shape), grad.new_zeros(ctx.shape), None


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Norms and PHSA's attention keep what they keep on a GPU; attention returns zeros."""

    def attend(q, k, v, ids, *_, **__):
        return _KeepsWhatTheKernelsKeep.apply(q, k, v, ids.shape[2]), None

    def select(q, pooled, *_, topk, **__):
        return torch.zeros(len(q), pooled.shape[1], topk, dtype=torch.int32)

    def pool(k, weights, cu_seqlens, *, block_tokens, **__):
        return k.new_zeros(len(k) // block_tokens, k.shape[1], 1, k.shape[2])

    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: _KeepsItsInput.apply(x))
    monkeypatch.setattr(block_choice, "pool", pool)
    monkeypatch.setattr(block_choice, "select", select)
    monkeypatch.setattr(core_attention, "attend", attend)
    monkeypatch.setattr(core_attention, "select", select)
    monkeypatch.setattr(context_parallel, "pool", pool)


@dataclass
class Pass:
    """A forward pass: the loss of every token, and what is kept for the backward pass."""

    losses: Tensor
    kept_bytes: int


@pytest.fixture
def forward(as_on_a_gpu) -> Callable[..., Pass]:
    """Returns `forward(model, micro_batch, config, part)`; `part` cuts [b, S] for a context-parallel process.

    Bytes are those of all storages that autograd keeps, weights left out.
    """

    def run(model, batch: MicroBatch, config: TrainConfig, part=lambda rows: rows) -> Pass:
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            # Without its operation: what an operation keeps holds this function and what it returned.
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model(
                part(batch.tokens),
                part(batch.positions),
                None,
                labels=part(batch.tokens),
                loss_mask=part(torch.ones(batch.tokens.shape)),
                packed_seq_params=batch.side_info(config),
            )
        return Pass(losses, sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in weights))

    return run
