"""A Llama-like decoder in plain PyTorch whose attention can be changed from one reading to the next.

For measurements that ask one prompt many times: texts are read once, their keys and values are kept, and each
selector then reads only the questions, many of one length at a time. Weights come from a Hugging Face folder
(config.json, *.safetensors); a test holds its logits to those of transformers. Training and everything else
uses the model room.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.huggingface import model_settings, read_config

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Takes a layer's number from 0, queries [b, n, Hq, D], and keys and values [b, T, Hkv, D] of which the
queries' are the last; returns [b, n, Hq, D]."""


@dataclass
class KeysAndValues:
    """Keys (after RoPE) and values of the tokens read so far, [b, tokens, Hkv, D] by layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def num_tokens(self) -> int:
        """Return how many tokens of each text have been read."""
        return self.keys[0].shape[1] if self.keys else 0


def attend_densely(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Full causal attention of the last queries."""
    n, total = query.shape[1], keys.shape[1]
    if n == total:
        return attend_masked(query, keys, values, None)
    rows = torch.arange(total - n, total, device=query.device)
    seen = torch.arange(total, device=query.device) <= rows[:, None]
    return attend_masked(query, keys, values, seen[None, None])


def attend_masked(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Return the attention [b, n, Hq, D] of queries [b, n, Hq, D] to keys and values [b, T, Hkv, D].

    Args:
        query: see above.
        keys: see above.
        values: see above.
        seen: bool [b * Hkv or 1, Hq / Hkv or 1, n, T], what a query attends to; None is causal, with n = T.
    """
    b, n, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    # Groups stand where a batch does, so that a mask serves all heads of a group.
    q = query.view(b, n, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (x.transpose(1, 2).flatten(0, 1)[:, None].repeat(1, group, 1, 1) for x in (keys, values))
    if seen is None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
    elif q.is_cuda:
        # The other kernel that takes a mask writes down all scores.
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            out = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.view(b, num_kv_heads, group, n, head_dim).permute(0, 3, 1, 2, 4).flatten(2, 3)


class ProbeModel:
    """The decoder; every method is without gradients."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        """Read the weights.

        Args:
            folder: a Hugging Face folder of a Llama without biases, q/k norms and RoPE scaling.
            dtype: of weights and activations; norms, RoPE and softmax are fp32.
            device: of both.

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
        self.device = torch.device(device)
        # On the CPU first: all devices then turn by the same angles.
        frequencies = base ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.frequencies = frequencies.to(self.device)
        self.weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a mapping
                    self.weights[name] = tensors.get_tensor(name).to(self.device, dtype)
        if "lm_head.weight" not in self.weights:
            self.weights["lm_head.weight"] = self.weights["model.embed_tokens.weight"]

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        before: KeysAndValues | None = None,
        attend: Attend = attend_densely,
        *,
        keeps: bool = True,
    ) -> tuple[Tensor, KeysAndValues]:
        """Return (hidden states [b, n, width] after the last norm, keys and values of all tokens read).

        Args:
            tokens: int64 [b, n].
            before: of the texts before them, which is left as it is.
            attend: the attention of these tokens.
            keeps: keep keys and values; otherwise what is returned is empty.
        """
        start = before.num_tokens if before else 0
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).float()
        angles = positions[:, None] * self.frequencies
        turn = angles.cos()[:, None], angles.sin()[:, None]
        hidden = self.weights["model.embed_tokens.weight"][tokens]
        after = KeysAndValues([], [])
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            x = self._norm(hidden, name + "input_layernorm")
            q, k, v = (
                self._heads(linear(x, self.weights[f"{name}self_attn.{p}_proj.weight"])) for p in "qkv"
            )
            q, k = _rotate(q, *turn), _rotate(k, *turn)
            if before:
                k = torch.cat([before.keys[layer], k], dim=1)
                v = torch.cat([before.values[layer], v], dim=1)
            if keeps:
                after.keys.append(k)
                after.values.append(v)
            out = attend(layer, q, k, v).to(x.dtype).flatten(2)
            hidden = hidden + linear(out, self.weights[name + "self_attn.o_proj.weight"])
            x = self._norm(hidden, name + "post_attention_layernorm")
            gate, up = (linear(x, self.weights[f"{name}mlp.{p}_proj.weight"]) for p in ("gate", "up"))
            hidden = hidden + linear(silu(gate) * up, self.weights[name + "mlp.down_proj.weight"])
        return self._norm(hidden, "model.norm"), after

    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 [..., vocabulary] of hidden states [..., width]."""
        return linear(hidden, self.weights["lm_head.weight"]).float()

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[name + ".weight"]
        return rms_norm(x.float(), (x.shape[-1],), weight.float(), self.norm_eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
