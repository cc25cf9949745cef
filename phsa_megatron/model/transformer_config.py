"""The schema as megatron's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from phsa_megatron.config.schema import Dtype, Elementwise, Fp8, Recompute, TrainConfig
from phsa_megatron.model.fused_rotary import rotate_compiled
from phsa_megatron.parallel.mcore import balancing_loss_factor, install_fused_rotation
from phsa_megatron.parallel.optional_libraries import required

_TORCH_DTYPE = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16}

_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    Recompute.none: {},
    Recompute.selective: {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    Recompute.mlp: {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    Recompute.full: {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

# Parts that the model does not have: no softmax, no bias and no dropout of megatron's, and another norm.
_UNUSED_FUSION = {"masked_softmax_fusion": False, "bias_dropout_fusion": False, "persist_layer_norm": False}


def transformer_config(config: TrainConfig) -> TransformerConfig:
    """Return megatron's configuration of the recipe's model.

    Weights are drawn on the CPU at full size and cut for tensor parallelism, so that they do not depend on
    its size. The loss is a sum over tokens that is divided once by the global count, so that gradients do
    not depend on how a batch is cut into micro-batches.
    """
    model, parallel = config.model, config.parallel
    dtype = _TORCH_DTYPE[config.run.dtype]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_query_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        use_cpu_initialization=True,
        mtp_num_layers=model.mtp_num_layers or None,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        context_parallel_size=parallel.context_size,
        expert_model_parallel_size=parallel.expert_size,
        sequence_parallel=parallel.sequence_parallel,
        **_experts(config),
        **_virtual_stages(parallel.virtual_pipeline_size),
        **recompute_settings(config),
        **_fusion(config),
        **_fp8(config),
        **_UNUSED_FUSION,
    )


def recompute_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of megatron's configuration that say what the backward pass computes again."""
    parallel = config.parallel
    settings = _RECOMPUTE[parallel.recompute]
    if parallel.recompute_layers is None:
        return settings
    return settings | {"recompute_method": "block", "recompute_num_layers": parallel.recompute_layers}


def _fp8(config: TrainConfig) -> dict[str, Any]:
    # Forward in e4m3, gradients in e5m2: "hybrid". The rules ask for Transformer Engine's layers.
    recipe = config.compute.fp8
    return {} if recipe == Fp8.none else {"fp8": "hybrid", "fp8_recipe": recipe.value}


def _fusion(config: TrainConfig) -> dict[str, Any]:
    compiled = config.compute.elementwise == Elementwise.compiled
    if compiled:
        # Megatron asks, when it is configured, whether there is a fused rotation.
        install_fused_rotation(rotate_compiled)
    if config.compute.fused_weight_gradient:
        setting = "compute.fused_weight_gradient=true"
        required(setting, "fused_weight_gradient_mlp_cuda", instead="compute.fused_weight_gradient=false")
    return {
        "bias_activation_fusion": compiled,
        "apply_rope_fusion": compiled,
        "gradient_accumulation_fusion": config.compute.fused_weight_gradient,
    }


def _experts(config: TrainConfig) -> dict[str, Any]:
    model, parallel = config.model, config.parallel
    if not model.num_experts:
        return {}
    balance = balancing_loss_factor(parallel.context_size * parallel.tensor_size)
    return {
        "num_moe_experts": model.num_experts,
        "expert_tensor_parallel_size": 1,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.expert_topk,
        "moe_router_load_balancing_type": "aux_loss" if model.expert_balance_coeff else "none",
        "moe_aux_loss_coeff": model.expert_balance_coeff * balance,
        # Near ties between experts are decided, and outputs averaged, in fp32 whatever the weights are.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }


def _virtual_stages(size: int | None) -> dict[str, Any]:
    if size is None:
        return {}
    # With batched sends, two stages of two chunks each exchange the wrong activations, without an error.
    return {
        "virtual_pipeline_model_parallel_size": size,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }
