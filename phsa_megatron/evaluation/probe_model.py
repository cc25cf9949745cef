"""A Llama-like decoder in plain PyTorch whose attention can be changed from one question to the next.

For measurements that ask one prompt many times: the text is read once, its keys and values are kept, and each
selector then reads only the question. Weights come from a Hugging Face folder (config.json, *.safetensors);
a test holds its logits to those of transformers. Training and everything else uses the model room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.huggingface import model_settings, read_config

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes a layer's number from 0, queries [n, Hq, D], and keys and values [T, Hkv, D] of which the queries'
are the last; returns [n, Hq, D]."""


@dataclass
class KeysAndValues:
    """Keys (after RoPE) and values of the tokens read so far, [tokens, Hkv, D] by layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have been read."""
        return len(self.keys[0]) if self.keys else 0


def attend_densely(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Full causal attention of the last queries."""
    n, total = len(query), len(keys)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    grouped = query.shape[1] > keys.shape[1]
    if n == total:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        seen = torch.arange(total) <= torch.arange(total - n, total)[:, None]
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out[0].transpose(0, 1)


class ProbeModel:
    """The decoder; every method is without gradients."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Read the weights.

        Args:
            folder: a Hugging Face folder of a Llama without biases, q/k norms and RoPE scaling.
            dtype: of weights and activations; norms, RoPE and softmax are fp32.

        Raises:
            ConfigError: the folder holds another kind of model.
        """
        settings = model_settings(read_config(folder), folder)
        if settings["qk_norm"]:
            raise ConfigError(f"{folder}: the probe model has no norms of queries and keys; give a Llama")
        self.num_layers: int = settings["num_layers"]
        self.num_heads: int = settings["num_query_heads"]
        self.num_kv_heads: int = settings["num_kv_heads"]
        self.head_dim: int = settings["head_dim"]
        self.norm_eps: float = settings["norm_eps"]
        base: float = settings["rope_base"]
        self.frequencies = base ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    self.weights[name] = tensors.get_tensor(name).to(dtype)
        if "lm_head.weight" not in self.weights:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    def read(
        self, tokens: Tensor, before: KeysAndValues | None = None, attend: Attend = attend_densely
    ) -> tuple[Tensor, KeysAndValues]:
        """Return (hidden states [n, width] after the last norm, keys and values of all tokens read).

        Args:
            tokens: int64 [n].
            before: of the text before them, which is left as it is.
            attend: the attention of these tokens.
        """
        hidden, after = self.read_many(tokens, before, [attend])
        return hidden[0], after[0]

    @torch.no_grad()
    def read_many(
        self, tokens: Tensor, before: KeysAndValues | None, attends: list[Attend]
    ) -> tuple[Tensor, list[KeysAndValues]]:
        """Read the same tokens with several attentions at once, which shares the products with the weights.

        Returns:
            Hidden states [attentions, n, width] after the last norm, and all keys and values of each.
        """
        start = before.num_tokens if before else 0
        angles = torch.arange(start, start + len(tokens)).float()[:, None] * self.frequencies
        turn = angles.cos()[:, None], angles.sin()[:, None]
        hidden = self.weights["model.embed_tokens.weight"][tokens].expand(len(attends), -1, -1)
        after = [KeysAndValues([], []) for _ in attends]
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            x = self._norm(hidden, name + "input_layernorm")
            q, k, v = (
                self._heads(linear(x, self.weights[f"{name}self_attn.{p}_proj.weight"])) for p in "qkv"
            )
            q, k = _rotate(q, *turn), _rotate(k, *turn)
            outs = []
            for i, attend in enumerate(attends):
                keys, values = k[i], v[i]
                if before:
                    keys = torch.cat([before.keys[layer], keys])
                    values = torch.cat([before.values[layer], values])
                after[i].keys.append(keys)
                after[i].values.append(values)
                outs.append(attend(layer, q[i], keys, values).to(x.dtype).flatten(1))
            hidden = hidden + linear(torch.stack(outs), self.weights[name + "self_attn.o_proj.weight"])
            x = self._norm(hidden, name + "post_attention_layernorm")
            gate, up = (linear(x, self.weights[f"{name}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            hidden = hidden + linear(silu(gate) * up, self.weights[name + "mlp.down_proj.weight"])
        return self._norm(hidden, "model.norm"), after

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 [n, vocabulary]."""
        return linear(hidden, self.weights["lm_head.weight"]).float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name + ".weight"]
        return rms_norm(x.float(), (x.shape[-1],), weight.float(), self.norm_eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
