"""NSA as a core attention (arXiv 2502.11089): compressed, selected and sliding-window branches under gates.

    out = g_cmp * compressed + g_slc * selected + g_win * window

Per query head, gates are sigmoids of a linear map of the layer's input. Each branch has keys and values of
its own, as in the paper: the selected branch those of the layer, so that the rest of the model is that of
every other selector, the other two their own projections, norms (where the model norms keys) and RoPE. What
the paper leaves open is chosen here: gates have one linear layer without bias; the compressing MLP has one
hidden layer of width D with SiLU, for each key-value head its own; keys are compressed before RoPE, which
then turns the compressed ones (`phsa_kernels.nsa` says why). Letters as in `core_attention.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from phsa_kernels.nsa import WINDOW_TOKENS, Compression, compressed_attention, turn
from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.dense_attention import Window, dense
from phsa_megatron.attention.head_weights import HeadWeights, drawn_apart
from phsa_megatron.attention.layer_input import LayerInput
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError


class NSACoreAttention(PHSACoreAttention):
    """Three gated branches; its weights are shared among tensor-parallel processes by key-value head."""

    def __init__(self, config: Any, layer_number: int, *args: Any, seed: int = 0, **kwargs: Any) -> None:
        """Take what `PHSACoreAttention` takes, and the seed of the run.

        Raises:
            ConfigError: context parallelism is on, or the window is not set.
        """
        super().__init__(config, layer_number, *args, **kwargs)
        if self.context_groups is not None:
            raise ConfigError(
                "attention.selector=nsa has no context parallelism: set parallel.context_size=1"
            )
        if self.attention.nsa_window_tokens is None:
            raise ConfigError("attention.selector=nsa needs attention.nsa_window_tokens")
        self.window_tokens = self.attention.nsa_window_tokens
        self.head_dim, self.norm_eps = config.kv_channels, config.layernorm_epsilon
        group, place = kwargs["pg_collection"].tp, f"{seed}/nsa/{self.mtp_depth}/{layer_number}"
        linear: dict[str, Any] = {"config": config, "bias": False, "gather_output": False, "tp_group": group}
        std, hidden, d = config.init_method_std, config.hidden_size, self.head_dim
        # Rows by head, so that a tensor-parallel process has those of its heads.
        self.linear_gate = ColumnParallelLinear(
            hidden,
            config.num_attention_heads * 3,
            init_method=drawn_apart(f"{place}/gate", std),
            **linear,
        )
        # By key-value head: key and value of the compressed branch, then of the window.
        self.linear_kv = ColumnParallelLinear(
            hidden,
            config.num_query_groups * 4 * d,
            init_method=drawn_apart(f"{place}/kv", std),
            **linear,
        )
        mlp = {"position": (WINDOW_TOKENS, d), "w_in": (WINDOW_TOKENS * d, d), "w_out": (d, d)}
        shapes: dict[str, tuple[int, ...]] = {
            f"{what}_{name}": shape for what in ("key", "value") for name, shape in mlp.items()
        }
        if config.qk_layernorm:
            # Gains minus one: weight decay then draws them to one, as megatron does not decay norms.
            shapes["key_gain"] = (2, d)
        self.heads = HeadWeights(config, group, place, shapes, zeros={"key_gain"})

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, side_info: SideInfo) -> Tensor:
        if side_info.is_dense:
            raise ConfigError("attention.selector=nsa has no full attention to fall back to")
        if not isinstance(side_info.layer_input, LayerInput):
            raise TypeError(f"layer {self.layer_number} got no input: NSA needs SelfAttentionWithInput")
        gates, keys, values = self._projected(side_info.layer_input)
        angles = side_info.layer_input.token_angles()
        q_pos, q_doc = side_info.positions()
        settings = self.attention
        compressed, ids = compressed_attention(
            query,
            keys[0],
            values[0],
            self._compression("key"),
            self._compression("value"),
            q_pos,
            q_doc,
            side_info.cu_seqlens,
            topk=side_info.topk_of(self.layer_number),
            init_tokens=settings.init_tokens,
            local_tokens=settings.local_tokens,
            block_tokens=settings.block_tokens,
            angles=angles,
            softmax_scale=self.softmax_scale,
            impl=settings.impl.value,
        )
        selected = self._over(query, key, value, ids, q_pos, q_doc, side_info, None)
        window = Window(0, self.window_tokens)
        near = dense(query, turn(keys[1], angles), values[1], side_info, self.softmax_scale, window)
        branches = torch.stack([compressed, selected, near], dim=2)  # [T, Hq, 3, D]
        return (branches * gates.unsqueeze(-1)).sum(2)

    def _projected(self, given: LayerInput) -> tuple[Tensor, Tensor, Tensor]:
        """Return gates [T, Hq, 3]; keys before RoPE and values [2, T, Hkv, D]: compressed branch, window."""
        gates, _ = self.linear_gate(given.hidden)
        both, _ = self.linear_kv(given.hidden)
        num_tokens, num_rows, _ = gates.shape
        both = both.view(num_tokens, num_rows, -1, 2, 2, self.head_dim)  # [S, b, Hkv, branch, kv, D]
        keys, values = both.unbind(4)
        if self.config.qk_layernorm:
            keys = _normed(keys, self.norm_eps) * (1 + self.heads.key_gain)
        flat_keys, flat_values = (
            x.permute(3, 1, 0, 2, 4).reshape(2, num_rows * num_tokens, -1, self.head_dim)
            for x in (keys, values)
        )
        gates = gates.sigmoid().transpose(0, 1).reshape(num_rows * num_tokens, -1, 3)
        return gates, flat_keys, flat_values

    def _compression(self, what: str) -> Compression:
        return Compression(*(getattr(self.heads, f"{what}_{name}") for name in Compression._fields))


def _normed(x: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square, computed in fp32 or wider and rounded once."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)
