"""The layer spec: megatron's local or Transformer Engine's layer with our core attention in it."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.indexer import IndexerCoreAttention
from phsa_megatron.attention.layer_input import SelfAttentionWithInput
from phsa_megatron.attention.nsa import NSACoreAttention
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionKind, Layers, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector
from phsa_megatron.parallel.optional_libraries import required

_CORE_ATTENTION = {AttentionKind.phsa: PHSACoreAttention, AttentionKind.dense: DenseCoreAttention}
_LEARNED = {Selector.nsa: NSACoreAttention, Selector.indexer: IndexerCoreAttention}


def layer_spec(config: TrainConfig, mtp_depth: int = 0) -> ModuleSpec:
    """Return the spec of one transformer layer of the recipe, with megatron's or Transformer Engine's norms.

    Both core attentions are ours, so that nothing of Transformer Engine's attention sees the side information
    on `packed_seq_params`, which it would take for a packed batch.

    Args:
        config: the whole recipe; `model`, `attention` and `parallel` are read.
        mtp_depth: 0 for a layer of the main stack, d for the layer of multi-token-prediction depth d.

    Raises:
        ConfigError: tensor parallelism would put the query heads of one key-value head on several processes,
            where they could not share one selection of blocks.
        DeviceError: Transformer Engine is asked for and absent.
    """
    if config.model.num_kv_heads % config.parallel.tensor_size:
        raise ConfigError(
            f"model.num_kv_heads={config.model.num_kv_heads} must be a multiple of "
            f"parallel.tensor_size={config.parallel.tensor_size}: the query heads of a key-value head select "
            "together and must be in one process"
        )
    experts, qk_norm = config.model.num_experts or None, config.model.qk_norm
    spec: Any
    if config.compute.layers == Layers.transformer_engine:
        setting = "compute.layers=transformer_engine"
        required(setting, "transformer_engine.pytorch", instead="compute.layers=local")
        spec = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, qk_layernorm=qk_norm)
    else:
        spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=qk_norm)
    params: dict[str, Any] = {
        "attention": config.attention,
        "parallel": config.parallel,
        "mtp_depth": mtp_depth,
    }
    core: type = _CORE_ATTENTION[config.attention.kind]
    learned = learned_selector(config.attention)
    if learned is not None:
        core, params["seed"] = _LEARNED[learned], config.run.seed
    if learned is not None:
        spec.submodules.self_attention.module = SelfAttentionWithInput
    heads = spec.submodules.self_attention.submodules
    heads.core_attention = ModuleSpec(module=core, params=params)
    return spec
