"""config.json of a Hugging Face folder to model settings and back, in both forms that are in use.

Until transformers 4.x RoPE was described by `rope_theta` and `rope_scaling`, since 5.x by `rope_parameters`;
the dtype was `torch_dtype`, now it is `dtype`. Both are read, and both are written.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import Dtype, ModelConfig

CONFIG_NAME = "config.json"

# What a model's class assumes where its config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "num_key_value_heads": 32},
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
}
_QK_NORM = {"qwen3": True, "llama": False, "mistral": False}
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_DTYPE_NAMES = {Dtype.fp32: "float32", Dtype.bf16: "bfloat16"}
# The settings that both sides have; the others only train a model.
_SHARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_query_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tie_embeddings",
    "qk_norm",
    "rope_base",
    "norm_eps",
    "num_experts",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json.

    Raises:
        ConfigError: it is missing or not an object.
    """
    path = folder / CONFIG_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no settings: give a folder of a Hugging Face model")
    return content


def model_settings(theirs: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the settings of `model` that a config.json describes, by name without `model.`.

    Args:
        theirs: content of config.json.
        source: its folder, for messages.

    Raises:
        ConfigError: it describes a model that is not built here; every reason is listed.
    """
    path = source / CONFIG_NAME
    kind = theirs.get("model_type")
    if kind not in _QK_NORM:
        raise ConfigError(
            f"{path}: model_type is {kind!r}; weights can be read from {', '.join(_QK_NORM)} (decoders with "
            "RoPE, SwiGLU and RMSNorm)"
        )
    theirs = _DEFAULTS[kind] | {name: value for name, value in theirs.items() if value is not None}
    rope_base, scaling = _rope(theirs)
    problems = list(_unknown_here(theirs, kind, scaling))
    missing = [
        name
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
        )
        if name not in theirs
    ]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: give a folder of a whole model")
    if problems:
        raise ConfigError(f"{path} describes a model that is not built here:\n" + "\n".join(problems))
    heads = theirs["num_attention_heads"]
    return {
        "num_layers": theirs["num_hidden_layers"],
        "hidden_size": theirs["hidden_size"],
        "ffn_hidden_size": theirs["intermediate_size"],
        "num_query_heads": heads,
        "num_kv_heads": theirs.get("num_key_value_heads", heads),
        "head_dim": theirs.get("head_dim", theirs["hidden_size"] // heads),
        "vocab_size": theirs["vocab_size"],
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
        "qk_norm": _QK_NORM[kind],
        "rope_base": rope_base,
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "num_experts": 0,
    }


def check_same_model(folder: Path, model: ModelConfig) -> None:
    """Compare config.json with the model settings.

    Raises:
        ConfigError: it lists every field that differs, with both values.
    """
    theirs = model_settings(read_config(folder), folder)
    ours = asdict(model)
    wrong = [
        f"  model.{key}: {ours[key]} here, {theirs[key]} there" for key in _SHARED if ours[key] != theirs[key]
    ]
    if wrong:
        raise ConfigError(
            f"{folder}: the weights belong to another model:\n"
            + "\n".join(wrong)
            + "\nSet the model settings to those of the folder, or choose another folder."
        )


def huggingface_config(
    model: ModelConfig, dtype: Dtype, max_positions: int, eos_id: int | None
) -> dict[str, Any]:
    """Return config.json of a model: a Qwen3 if queries and keys have norms, else a Llama.

    Args:
        model: the shape.
        dtype: of the weights in the folder.
        max_positions: tokens of the longest sequence it was trained on.
        eos_id: of the token that ends a document; None names none.

    Raises:
        ConfigError: the model has parts that neither of them has.
    """
    if model.num_experts:
        raise ConfigError(
            f"model.num_experts={model.num_experts}: experts have no counterpart in a Qwen3 or Llama folder; "
            "a model with experts cannot be exported"
        )
    if model.mtp_num_layers:
        raise ConfigError(
            f"model.mtp_num_layers={model.mtp_num_layers}: multi-token prediction has no counterpart in a "
            "Qwen3 or Llama folder; start a stage with model.mtp_num_layers=0 from this run and export that"
        )
    kind = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_query_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "torch_dtype": _DTYPE_NAMES[dtype],
        "dtype": _DTYPE_NAMES[dtype],
    } | ({} if model.qk_norm else {"mlp_bias": False})


def eos_id_of(theirs: dict[str, Any]) -> int | None:
    """Return the id of the token that ends a document; the first where several are named, None for none."""
    found = theirs.get("eos_token_id")
    if isinstance(found, list):
        found = found[0] if found else None
    return None if found is None else int(found)


def _rope(theirs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return (theta, the scaling if there is any), whichever form they are written in."""
    parameters = theirs.get("rope_parameters") or {}
    # One entry for each kind of layer: only models whose layers are all alike are built here.
    if set(parameters) == {"full_attention"}:
        parameters = parameters["full_attention"]
    theta = parameters.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    scaling = theirs.get("rope_scaling") or parameters
    # Older folders call the kind "type". Default means that there is no scaling.
    nested = any(isinstance(value, dict) for value in scaling.values())
    kind = "by layer" if nested else scaling.get("rope_type", scaling.get("type", "default"))
    return float(theta), {} if kind == "default" else scaling


def _unknown_here(theirs: dict[str, Any], kind: str, scaling: dict[str, Any]) -> list[str]:
    """Return a line for each part of a model that would change its function and is not built here."""
    lines = []
    if scaling:
        lines.append(f"  RoPE scaling: none here, {scaling} there")
    if theirs.get("hidden_act", "silu") != "silu":
        lines.append(f"  activation: silu here, {theirs['hidden_act']} there")
    for name in ("attention_bias", "mlp_bias"):
        if theirs.get(name):
            lines.append(f"  {name}: no biases here, {theirs[name]} there")
    partial = (theirs.get("rope_parameters") or {}).get(
        "partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0)
    )
    if partial != 1.0:
        lines.append(f"  partial_rotary_factor: 1 here, {partial} there")
    slides = theirs.get("use_sliding_window", kind == "mistral") and theirs.get("sliding_window")
    if slides or "sliding_attention" in theirs.get("layer_types", []):
        lines.append(
            f"  sliding_window: every layer sees all tokens here, {theirs.get('sliding_window')} there"
        )
    return lines
