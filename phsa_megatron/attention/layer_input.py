"""What a selector with projections of its own needs of its layer: the attention's input, and angles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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

    def token_angles(self) -> Tensor:
        """Return RoPE's angles [T, D] of the flattened tokens, row after row."""
        return self.angles.flatten(1).repeat(self.hidden.shape[1], 1)


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
