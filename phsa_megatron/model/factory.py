"""The one place where a model is built."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from phsa_megatron.attention.spec import layer_spec
from phsa_megatron.config.activations import joins_rows
from phsa_megatron.config.flops import padded_vocab_size
from phsa_megatron.config.schema import ContextSharding, Dtype, Layers, Loss, TrainConfig
from phsa_megatron.model.chunked_loss import ChunkedLossGPT
from phsa_megatron.model.experts import draw_expert_weights, random_numbers_of_experts_apart
from phsa_megatron.model.joined_rows import join_rows
from phsa_megatron.model.norm import norm_class
from phsa_megatron.model.rotary import ContiguousRotaryEmbedding
from phsa_megatron.model.transformer_config import transformer_config
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.parallel.mcore import mtp_block_spec, prepare_experts


def build_model(config: TrainConfig, groups: Groups) -> list[MegatronModule]:
    """Return this process's model chunks, on its device: one, or one per virtual pipeline stage.

    Every chunk is a GPTModel; with `run.dtype=bf16` megatron's Float16Module is around it. They are not yet
    wrapped for data parallelism. Weights follow from `run.seed`, which `groups.initialize` has set.

    Raises:
        ConfigError: the recipe asks for something that no layer here does; the message names the field.
    """
    num_chunks = config.parallel.virtual_pipeline_size
    if config.model.num_experts:
        prepare_experts()
    megatron_config = transformer_config(config)
    stages: list[int | None] = [None] if num_chunks is None else list(range(num_chunks))
    chunks = [_build_chunk(config, megatron_config, groups, stage).to(groups.device) for stage in stages]
    if config.run.dtype == Dtype.bf16:
        chunks = [Float16Module(megatron_config, chunk) for chunk in chunks]
    return chunks


def _build_chunk(config: TrainConfig, megatron_config: Any, groups: Groups, vp_stage: int | None) -> GPTModel:
    model = config.model
    num_chunks = config.parallel.virtual_pipeline_size or 1
    chunk = vp_stage or 0
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer(config)] * get_num_layers_to_build(megatron_config, vp_stage=vp_stage),
        layer_norm=norm_class(config.compute.norm),
    )
    prediction = None
    if model.mtp_num_layers:
        prediction = mtp_block_spec(
            megatron_config,
            lambda depth: _layer(config, depth),
            norm=norm_class(config.compute.norm),
            vp_stage=vp_stage,
        )
    chunked = config.compute.loss == Loss.chunked
    with random_numbers_of_experts_apart():
        gpt = (ChunkedLossGPT if chunked else GPTModel)(
            config=megatron_config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(model, config.parallel.tensor_size),
            max_sequence_length=config.data.seq_len_tokens,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == num_chunks - 1,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            mtp_block_spec=prediction,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
    if joins_rows(config):
        join_rows(gpt.decoder)
    if chunked:
        gpt.loss_chunk_tokens = config.compute.loss_chunk_tokens
    if config.parallel.context_size > 1 and config.parallel.context_sharding == ContextSharding.contiguous:
        gpt.rotary_pos_emb = ContiguousRotaryEmbedding(
            kv_channels=model.head_dim,
            rotary_percent=1.0,
            rotary_base=model.rope_base,
            use_cpu_initialization=True,
            cp_group=groups.collection.cp,
        )
    if model.num_experts:
        draw_expert_weights(gpt, config.run.seed)
    if prediction is not None and model.tie_embeddings and not gpt.pre_process:
        # With prediction layers the last stage has the shared embedding as its output weight. megatron
        # allocates an output weight all the same, which nothing reads, and then refuses to save the model.
        gpt.output_layer.weight = None
    return gpt


def _layer(config: TrainConfig, mtp_depth: int = 0) -> ModuleSpec:
    """Return a layer's spec with our norm in all of its places; Transformer Engine's has its own."""
    spec = layer_spec(config, mtp_depth)
    if config.compute.layers == Layers.transformer_engine:
        return spec
    norm = norm_class(config.compute.norm)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    if config.model.qk_norm:
        heads = spec.submodules.self_attention.submodules
        heads.q_layernorm = heads.k_layernorm = norm
    return spec
