"""What a selector with projections of its own needs of its layer: the attention's input, and angles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from phsa_megatron.attention.side_info import SideInfo


@dataclass(frozen=True, eq=False)
class LayerInput:
    """One layer's input to its attention.

    Attributes:
        hidden: [S, b, h] after the layer's norm; [S / TP, b, h] under sequence parallelism.
        angles: RoPE's, [S, 1, 1, D], the same for queries and keys.
    """

    hidden: Tensor
    angles: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Return [S, b, H, D] turned by RoPE as megatron turns the layer's own keys."""
        cos, sin = self.angles.cos().to(x.dtype), self.angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class SelfAttentionWithInput(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention that shows its core attention the layer's input, on the side information.

    It may ride there because nothing keeps it: each call of a layer, recomputed ones included, makes its own
    copy of the side information. Recomputation of the core attention alone would bypass it, and is refused.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return what megatron's self-attention returns; see there."""
        if isinstance(packed_seq_params, SideInfo):
            angles = rotary_pos_emb[1] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
            given = LayerInput(hidden_states, angles)
            packed_seq_params = replace(packed_seq_params, layer_input=given)
        return super().forward(
            hidden_states,
            *args,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
