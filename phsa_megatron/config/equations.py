"""Writes every derived number as an equation with its inputs, for the print before step one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phsa_megatron.config.context_volume import ExchangedTokens, context_volume
from phsa_megatron.config.schema import (
    AttentionConfig,
    AttentionKind,
    ContextExchange,
    LrSchedule,
    TopkSchedule,
    TrainConfig,
)
from phsa_megatron.config.selector_kinds import selects_blocks
from phsa_megatron.config.topk_schedule import changes_over_steps

if TYPE_CHECKING:
    from phsa_megatron.config.derive import Derived


def equations(config: TrainConfig, derived: Derived) -> list[str]:
    """Return one line for each derived number of a run."""
    return [
        *_layout(config, derived),
        *_batch(config, derived),
        *_parameters(config, derived),
        *_flops(config, derived),
        *_memory(config, derived),
    ]


def _layout(config: TrainConfig, derived: Derived) -> list[str]:
    parallel, cluster = config.parallel, config.cluster
    layers = (
        f"layers per pipeline stage = {config.model.num_layers} layers / {parallel.pipeline_size} stages"
        + (f" / {parallel.virtual_pipeline_size} chunks" if parallel.virtual_pipeline_size else "")
        + f" = {derived.layers_per_chunk}"
    )
    return [
        f"processes = {cluster.num_nodes} nodes x {cluster.processes_per_node} a node = {derived.world_size}",
        f"data-parallel size = {derived.world_size} processes / ({parallel.tensor_size} tensor x "
        f"{parallel.pipeline_size} pipeline x {parallel.context_size} context) = "
        f"{derived.data_parallel_size}",
        layers,
        *_context(config),
    ]


def _context(config: TrainConfig) -> list[str]:
    """Return what a layer sends between context-parallel processes, as far as settings tell."""
    exchange = config.parallel.context_exchange
    if config.parallel.context_size == 1:
        return []
    gathers_all = exchange == ContextExchange.all_gather
    volume = context_volume(config, None if gathers_all else ExchangedTokens(0, 0))
    line = (
        f"bytes a process sends in a layer and micro-batch = keys at chunk starts "
        f"{volume.boundary_keys_bytes:,} + pooled keys {volume.pooled_keys_bytes:,}"
    )
    if gathers_all:
        line += (
            f" + keys and values {volume.keys_and_values_bytes:,} + their gradients "
            f"{volume.gradient_bytes:,} = {volume.forward_bytes + volume.gradient_bytes:,}"
        )
    else:
        line += f" + marks of needed blocks {volume.block_marks_bytes:,} + " + (
            "needed blocks and their gradients"
            if exchange == ContextExchange.block_sparse
            else "needed blocks or all keys and values, whichever are fewer, and their gradients"
        )
        line += ": see perf/context_sent_bytes_per_layer"
    return [line]


def _batch(config: TrainConfig, derived: Derived) -> list[str]:
    optim, run = config.optim, config.run
    batch, length = optim.global_batch_sequences, config.data.seq_len_tokens
    if optim.schedule == LrSchedule.cosine:
        decay = (
            f"learning-rate decay = ({run.train_steps:,} - {optim.warmup_steps:,}) steps x {batch:,} "
            f"sequences = {derived.decay_sequences:,} sequences (cosine)"
        )
    else:
        decay = (
            f"learning-rate decay = {optim.decay_steps:,} steps x {batch:,} sequences = "
            f"{derived.decay_sequences:,} sequences (wsd, the last ones)"
        )
    return [
        f"micro-batches per step = {batch:,} sequences / ({optim.micro_batch_sequences} a micro-batch x "
        f"{derived.data_parallel_size} data-parallel) = {derived.micro_batches_per_step:,}",
        f"tokens per step = {batch:,} sequences x {length:,} tokens = {derived.tokens_per_step:,}",
        f"sequences = {run.train_steps:,} steps x {batch:,} sequences = {derived.total_sequences:,}",
        f"tokens = {run.train_steps:,} steps x {derived.tokens_per_step:,} tokens = {derived.total_tokens:,}",
        f"learning-rate warm-up = {optim.warmup_steps:,} steps x {batch:,} sequences = "
        f"{derived.warmup_sequences:,} sequences",
        decay,
        "document boundaries per sequence = "
        + ("" if config.data.max_documents_per_sequence is not None else f"{length:,} tokens / 16 = ")
        + f"{derived.max_documents_per_sequence:,}",
    ]


def _parameters(config: TrainConfig, derived: Derived) -> list[str]:
    model, count = config.model, derived.parameters
    multiple = f"{model.vocab_pad_multiple} x {config.parallel.tensor_size}"
    terms = f"{model.num_layers} layers x {count.per_layer:,} + final norm {model.hidden_size:,}"
    if model.mtp_num_layers:
        terms += f" + token-prediction depths {count.mtp:,}"
    output = "tied output 0" if model.tie_embeddings else f"output {count.output_layer:,}"
    return [
        f"query heads per key-value head (R) = {model.num_query_heads} / {model.num_kv_heads} = "
        f"{derived.group_heads}",
        f"padded vocabulary = {model.vocab_size:,} rounded up to a multiple of {multiple} = "
        f"{derived.padded_vocab_size:,}",
        f"parameters without embeddings = {terms} = {count.non_embedding:,}",
        f"parameters = {count.non_embedding:,} + embedding {derived.padded_vocab_size:,} x "
        f"{model.hidden_size:,} + {output} = {count.total:,}",
    ]


def _flops(config: TrainConfig, derived: Derived) -> list[str]:
    length, attention = config.data.seq_len_tokens, config.attention
    linear = 6 * derived.parameters.active_in_products
    lines = [
        f"FLOPs per token, dense equivalent = 6 x {derived.parameters.active_in_products:,} weights in "
        f"matrix products + causal attention {derived.flops_per_token_dense - linear:,.0f} = "
        f"{derived.flops_per_token_dense:.4g} (forward + backward, documents of {length:,} tokens)",
        f"FLOPs per token, selected = {linear:,} + attention and selection "
        f"{derived.flops_per_token_selected - linear:,.0f} = {derived.flops_per_token_selected:.4g}",
    ]
    if attention.kind == AttentionKind.phsa:
        lines += _sparsity(config, derived)
    return lines


def _sparsity(config: TrainConfig, derived: Derived) -> list[str]:
    """The two definitions, each named; then what differs from them in some steps or layers."""
    attention, length = config.attention, config.data.seq_len_tokens
    selects = selects_blocks(attention)
    k = f"k = {attention.train_topk}" if selects else "nothing selected"
    attended = f"init {attention.init_tokens} + local {attention.local_tokens}"
    if selects:
        attended += f" + {attention.train_topk} x {attention.block_tokens}"
    if attention.nsa_window_tokens is not None:
        attended += f", or in the window of {attention.nsa_window_tokens}"
    lines = [
        f"selector = {attention.selector}",
        f"sparsity at the last token = 1 - at most ({attended}) / {length:,} tokens = "
        f"{derived.sparsity_last_token_frac:.2%} ({k})",
        f"sparsity, mean over causal positions = {derived.sparsity_mean_frac:.2%} ({k})",
        f"selected blocks in evaluation and generation (k) = {derived.topk_inference}",
    ]
    if attention.dense_layers:
        numbers = ", ".join(map(str, sorted(attention.dense_layers)))
        lines.append(f"layers with full causal attention, 0% sparse = {numbers} of {config.model.num_layers}")
    if changes_over_steps(attention):
        lines.append(f"k over the steps = {_schedule(attention)}; FLOPs and sparsity above are those of {k}")
    return lines


def _schedule(attention: AttentionConfig) -> str:
    full = ""
    if attention.align_coeff:
        full = f"; full attention in a share of {attention.align_full_frac:g} of the steps, drawn per step"
    first = f"dense for {attention.topk_dense_steps:,} steps, then " if attention.topk_dense_steps else ""
    choices = ", ".join(map(str, attention.topk_choices))
    kinds = {
        TopkSchedule.constant: f"{attention.train_topk}",
        TopkSchedule.anneal: f"from {attention.topk_start} down to {attention.train_topk} over "
        f"{attention.topk_anneal_steps:,} steps, then {attention.train_topk}",
        TopkSchedule.random_step: f"one of {choices} drawn per step",
        TopkSchedule.random_layer: f"one of {choices} drawn per step and layer",
    }
    return first + kinds[attention.topk_schedule] + full


def _memory(config: TrainConfig, derived: Derived) -> list[str]:
    memory, limit = derived.memory, config.cluster.memory_gib
    line = (
        f"memory of a device, estimated = weights {memory.weights_gib:.2f} + gradients "
        f"{memory.grads_gib:.2f} + optimizer {memory.optimizer_gib:.2f} + activations "
        f"{memory.activations_gib:.2f} + gathered keys and values {memory.gathered_kv_gib:.2f} + working at "
        f"the {memory.moment} {memory.working_gib:.2f} = {memory.total_gib:.2f} GiB"
    )
    if limit is not None:
        line += f" of {limit:g} GiB" + (": MORE THAN THERE IS" if memory.total_gib > limit else "")
    return [line]
