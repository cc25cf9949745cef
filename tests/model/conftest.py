"""Micro-batches with documents, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch, TrainConfig

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
