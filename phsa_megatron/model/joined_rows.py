"""The rows of a micro-batch one after another while they are in the transformer layers.

Megatron keeps hidden states as [S, b, h]: the tokens of b rows lie interleaved, and attention, whose
documents are consecutive tokens, copies queries, keys, values, outputs and all of their gradients in every
layer. Before the first layer of a model chunk and after its last one a single copy each does for all of them:
in between there is one row of T = b * S tokens, with the angles of RoPE repeated for each. Nothing else
changes: documents end where they ended, and outside of the layers rows are what they were.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from phsa_megatron.attention.side_info import SideInfo


def join_rows(decoder: MegatronModule) -> None:
    """Make the transformer block of a model chunk work on joined rows, whenever it is given several."""
    decoder.register_forward_pre_hook(_join, with_kwargs=True)
    decoder.register_forward_hook(_part, with_kwargs=True)


def _num_rows(given: dict[str, Any]) -> int:
    # One new token of each row (a DecodeStep) stays as it is.
    side_info = given.get("packed_seq_params")
    return side_info.token_ids.shape[0] if isinstance(side_info, SideInfo) else 1


def _join(decoder: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    num_rows = _num_rows(given)
    if num_rows == 1:
        return None
    joined = dict(given)
    if given["hidden_states"] is not None:
        joined["hidden_states"] = _row_after_row(given["hidden_states"])
    if decoder.input_tensor is not None:  # of the pipeline stage before
        decoder.input_tensor = _row_after_row(decoder.input_tensor)
    side_info: SideInfo = given["packed_seq_params"]
    joined["packed_seq_params"] = side_info.joined()
    if given.get("rotary_pos_emb") is not None:
        joined["rotary_pos_emb"] = _repeated(given["rotary_pos_emb"], num_rows)
    return args, joined


def _part(_: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> Any:
    side_info = given.get("packed_seq_params")
    if not isinstance(side_info, SideInfo) or side_info.num_joined_rows == 1:
        return output
    return output.view(side_info.num_joined_rows, -1, output.shape[-1]).transpose(0, 1).contiguous()


def _row_after_row(hidden: Tensor) -> Tensor:
    """Return [S, b, h] as [b * S, 1, h]."""
    return hidden.transpose(0, 1).reshape(-1, 1, hidden.shape[-1])


def _repeated(angles: Tensor, num_rows: int) -> Tensor:
    """Return RoPE's angles [S, 1, 1, D] for every row, [b * S, 1, 1, D].

    Megatron hands the same tensor of angles to every step: what is made of it is kept with it.
    """
    kept: dict[int, Tensor] = getattr(angles, "of_rows", {})
    if num_rows not in kept:
        kept[num_rows] = angles.repeat(num_rows, 1, 1, 1)
        angles.of_rows = kept  # type: ignore[attr-defined]
    return kept[num_rows]
