"""Weights of a Qwen3- or Llama-like Hugging Face folder and those of this process's model, tensor by tensor.

| Hugging Face | megatron |
|---|---|
| model.embed_tokens | embedding.word_embeddings |
| layers.N.self_attn.{q,k,v}_proj | self_attention.linear_qkv: by key-value group: queries, key, value |
| layers.N.self_attn.o_proj | self_attention.linear_proj |
| layers.N.self_attn.{q,k}_norm | self_attention.{q,k}_layernorm |
| layers.N.mlp.{gate,up}_proj | mlp.linear_fc1: gate, then up, within each tensor-parallel share |
| layers.N.mlp.down_proj | mlp.linear_fc2 |
| layers.N.input_layernorm | input_layernorm |
| layers.N.post_attention_layernorm | pre_mlp_layernorm |
| model.norm, lm_head | decoder.final_layernorm, output_layer |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phsa_megatron.config.errors import CheckpointError, ConfigError
from phsa_megatron.config.huggingface import check_same_model
from phsa_megatron.config.schema import ModelConfig, TrainConfig
from phsa_megatron.model import selector_weights

_SIMPLE = {
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.linear_fc2": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
}
_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.weight")


def fill_from_huggingface(
    folder: Path, config: TrainConfig, modules: Sequence[torch.nn.Module], tensor_rank: int = 0
) -> None:
    """Fill this process's model; other layouts than one process read only their share.

    Args:
        folder: config.json and *.safetensors.
        config: the run; its model settings must describe the same model.
        modules: the bare GPT models of this process, filled in place.
        tensor_rank: of this process among `parallel.tensor_size`.

    Raises:
        ConfigError: the folder holds another model than the settings describe.
        CheckpointError: a tensor is missing, has another shape, or is one that this model has no place for.
    """
    check_same_model(folder, config.model)
    if config.model.mtp_num_layers:
        raise ConfigError(
            f"model.mtp_num_layers={config.model.mtp_num_layers}: a Hugging Face folder has no weights for "
            "multi-token prediction; set it to 0"
        )
    tensors = TensorFolder(folder)
    tensors.check_all_known(config.model)
    share = _Share(config, tensor_rank, config.parallel.tensor_size)
    with torch.no_grad():
        for module in modules:
            for name, parameter in module.named_parameters():
                if selector_weights.PLACE in name:
                    continue  # a selector's own weights start fresh
                _fill(parameter, name, global_layer(module, name), tensors, share)


def huggingface_tensors(name: str, layer: int, weight: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """Return a whole megatron weight as the tensors that it is in a Hugging Face folder, as views of it.

    Args:
        name: of the parameter in a GPTModel that is not split over tensor-parallel processes.
        layer: its number in the whole model, from 0; -1 outside of layers.
        weight: its value, of any dtype and device; shapes alone (meta) do.
        model: head counts and vocabulary size; rows that only pad the vocabulary are left out.

    Raises:
        CheckpointError: there is no tensor for this parameter.
    """
    if name in _OUTSIDE:
        return {_OUTSIDE[name]: weight if "norm" in name else weight[: model.vocab_size]}
    match = _LAYER.fullmatch(name)
    prefix, part = f"model.layers.{layer}.", match.group(2) if match else ""
    if part == "self_attention.linear_qkv":
        parts = zip("qkv", split_qkv(weight, model), strict=True)
        return {f"{prefix}self_attn.{letter}_proj.weight": tensor for letter, tensor in parts}
    if part == "mlp.linear_fc1":
        gate, up = weight.chunk(2)
        return {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
    if part in _SIMPLE:
        return {f"{prefix}{_SIMPLE[part]}.weight": weight}
    raise CheckpointError(f"{name}: a Qwen3 or Llama folder has no tensor for this parameter")


class _Share:
    """Which part of a full tensor belongs to this process."""

    def __init__(self, config: TrainConfig, rank: int, size: int) -> None:
        self.config, self.rank, self.size = config, rank, size
        if config.model.num_kv_heads % size:
            raise ConfigError(
                f"parallel.tensor_size={size} must divide model.num_kv_heads={config.model.num_kv_heads}: "
                "weights of a Hugging Face folder are spread by whole key-value groups: use a divisor"
            )

    def of(self, full: Tensor, dim: int) -> Tensor:
        """This process's chunk along a dimension."""
        return full.chunk(self.size, dim)[self.rank]


class TensorFolder:
    """Tensors of a folder by name, whichever file they are in."""

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._file_of: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as stream:
                    self._file_of.update(dict.fromkeys(stream.keys(), path))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged: {error}; download it again") from error

    def check_all_known(self, model: ModelConfig) -> None:
        """Refuse tensors that this model has no place for: leaving them out would change its function."""
        known = {
            f"model.layers.{i}.{name}.weight" for i in range(model.num_layers) for name in _layer_names(model)
        }
        known |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        unknown = sorted(
            name for name in self._file_of if name not in known and not name.endswith("inv_freq")
        )
        if unknown:
            raise CheckpointError(
                f"{self._path} holds {len(unknown)} tensors that this model has no place for, such as "
                f"{', '.join(unknown[:3])}: it is another kind of model"
            )

    def dtype(self) -> torch.dtype:
        """The one dtype of all tensors.

        Raises:
            CheckpointError: there are several, or no tensors.
        """
        found = set()
        for path in sorted(set(self._file_of.values())):
            with safe_open(path, framework="pt") as stream:
                found |= {stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        if len(found) != 1 or not found <= _DTYPES.keys():
            raise CheckpointError(
                f"{self._path} holds tensors of dtype {', '.join(sorted(found)) or 'none'}: all must be "
                f"of the same, {', '.join(_DTYPES)}; dequantize a quantized folder first"
            )
        return _DTYPES[found.pop()]

    def get(self, name: str) -> Tensor:
        """A tensor on the CPU, in the dtype of the file."""
        if name not in self._file_of:
            raise CheckpointError(
                f"{self._path} has no tensor {name}: files are missing, or it is another kind of model"
            )
        with safe_open(self._file_of[name], framework="pt") as stream:
            tensor: Tensor = stream.get_tensor(name)
        return tensor


def _layer_names(model: ModelConfig) -> list[str]:
    names = [f"self_attn.{letter}_proj" for letter in "qkv"] + [
        "mlp.gate_proj",
        "mlp.up_proj",
        *_SIMPLE.values(),
    ]
    return [name for name in names if model.qk_norm or not name.endswith(("q_norm", "k_norm"))]


def global_layer(module: torch.nn.Module, name: str) -> int:
    """Number of a parameter's layer in the whole model, from 0; -1 outside of layers."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return -1
    layers: Any = module.get_submodule("decoder.layers")
    return int(layers[int(match.group(1))].layer_number) - 1


def _fill(parameter: Tensor, name: str, layer: int, tensors: TensorFolder, share: _Share) -> None:
    if name in _OUTSIDE:
        source = _OUTSIDE[name]
        if name == "output_layer.weight" and share.config.model.tie_embeddings:
            source = "model.embed_tokens.weight"  # the last pipeline stage's copy of the tied embedding
        full = tensors.get(source)
        if "norm" in name:
            _copy(parameter, full, source)
        else:
            _copy_rows(parameter, full, source, share)
        return
    match = _LAYER.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name}: no tensor of a Hugging Face folder belongs into this parameter")
    prefix, part = f"model.layers.{layer}.", match.group(2)
    if part == "self_attention.linear_qkv":
        query, key, value = (tensors.get(f"{prefix}self_attn.{letter}_proj.weight") for letter in "qkv")
        _copy(
            parameter, share.of(join_qkv(query, key, value, share.config.model), 0), prefix + "self_attn.qkv"
        )
    elif part == "mlp.linear_fc1":
        halves = [share.of(tensors.get(f"{prefix}mlp.{half}_proj.weight"), 0) for half in ("gate", "up")]
        _copy(parameter, torch.cat(halves), prefix + "mlp.gate_proj and up_proj")
    elif part in _SIMPLE:
        source = f"{prefix}{_SIMPLE[part]}.weight"
        full = tensors.get(source)
        row_parallel = part in ("self_attention.linear_proj", "mlp.linear_fc2")
        _copy(parameter, share.of(full, 1) if row_parallel else full, source)
    else:
        raise CheckpointError(f"{name}: no tensor of a Hugging Face folder belongs into this parameter")


def join_qkv(query: Tensor, key: Tensor, value: Tensor, model: ModelConfig) -> Tensor:
    """The three projections as megatron's one.

    Args:
        query: [num_query_heads * head_dim, hidden_size].
        key: [num_kv_heads * head_dim, hidden_size].
        value: as `key`.
        model: head counts.

    Returns:
        [(num_query_heads + 2 * num_kv_heads) * head_dim, hidden_size]: for each key-value group the rows of
        its query heads, then its key's, then its value's.

    Raises:
        CheckpointError: a projection has another shape.
    """
    groups = model.num_kv_heads
    rows = (model.num_query_heads * model.head_dim, groups * model.head_dim, groups * model.head_dim)
    if (query.shape[0], key.shape[0], value.shape[0]) != rows:
        raise CheckpointError(
            f"q, k and v projections have {query.shape[0]}, {key.shape[0]} and {value.shape[0]} rows; the "
            f"model settings ask for {rows[0]}, {rows[1]} and {rows[2]}"
        )
    by_group = [tensor.view(groups, -1, tensor.shape[1]) for tensor in (query, key, value)]
    return torch.cat(by_group, dim=1).reshape(-1, query.shape[1])


def split_qkv(joined: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the query, key and value projections in megatron's one: the inverse of `join_qkv`."""
    heads = model.num_query_heads // model.num_kv_heads
    by_group = joined.view(model.num_kv_heads, heads + 2, model.head_dim, joined.shape[1])
    query, key, value = by_group[:, :heads], by_group[:, heads], by_group[:, heads + 1]
    width = joined.shape[1]
    return query.reshape(-1, width), key.reshape(-1, width), value.reshape(-1, width)


def _copy(parameter: Tensor, value: Tensor, source: str) -> None:
    if parameter.shape != value.shape:
        raise CheckpointError(
            f"{source} has shape {tuple(value.shape)}, the model asks for {tuple(parameter.shape)}"
        )
    parameter.copy_(value)


def _copy_rows(parameter: Tensor, full: Tensor, source: str, share: _Share) -> None:
    """Copy this process's rows of an embedding; rows that only pad the vocabulary keep their fresh values."""
    vocab_size = share.config.model.vocab_size
    if full.shape != (vocab_size, parameter.shape[1]):
        raise CheckpointError(
            f"{source} has shape {tuple(full.shape)}, the model asks for {(vocab_size, parameter.shape[1])}"
        )
    first = share.rank * parameter.shape[0]
    rows = full[first : first + parameter.shape[0]]
    parameter[: rows.shape[0]].copy_(rows)
