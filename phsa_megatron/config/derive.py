"""Every value that follows from the settings, computed once and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field

from phsa_megatron.config import equations as print_equations
from phsa_megatron.config import flops
from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.memory import MemoryEstimate, estimate_memory
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.selector_kinds import inference_topk, selects_blocks


@dataclass(frozen=True)
class Derived:
    """What follows from a configuration.

    Attributes:
        world_size: processes of the run.
        data_parallel_size: model copies (DP).
        group_heads: query heads of one key-value head (R).
        padded_vocab_size: rows of the embedding over all devices.
        topk_inference: selected blocks in evaluation and generation.
        micro_batches_per_step: forward passes of each process in one step.
        tokens_per_step: tokens of one optimizer step over all processes.
        total_sequences: sequences of the whole run.
        total_tokens: tokens of the whole run.
        warmup_sequences: length of the warm-up.
        decay_sequences: length of the decay (wsd: the last part; cosine: all after the warm-up).
        max_documents_per_sequence: fixed length of a sequence's boundary tensor.
        layers_per_chunk: transformer layers of one pipeline stage or virtual chunk.
        parameters: exact counts over all devices.
        flops_per_sequence_dense: forward and backward, with full causal attention over the sequence.
        flops_per_sequence_selected: the same with this run's attention, selection included.
        flops_per_token_dense: the former per token.
        flops_per_token_selected: the latter per token.
        sparsity_last_token_frac: share of a full-length document that its last query leaves out, in training.
        sparsity_mean_frac: share of its causal (query, key) pairs left out, in training.
        memory: estimate for the fullest device.
    """

    world_size: int
    data_parallel_size: int
    group_heads: int
    padded_vocab_size: int
    topk_inference: int
    micro_batches_per_step: int
    tokens_per_step: int
    total_sequences: int
    total_tokens: int
    warmup_sequences: int
    decay_sequences: int
    max_documents_per_sequence: int
    layers_per_chunk: int
    parameters: flops.ParameterCount
    flops_per_sequence_dense: int
    flops_per_sequence_selected: int
    flops_per_token_dense: float
    flops_per_token_selected: float
    sparsity_last_token_frac: float
    sparsity_mean_frac: float
    memory: MemoryEstimate
    lines: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def equations(self) -> list[str]:
        """Return every derived number as an equation a person can check, one a line."""
        return list(self.lines)


def world_size(config: TrainConfig) -> int:
    """Return the number of processes."""
    return config.cluster.num_nodes * config.cluster.processes_per_node


def model_parallel_size(config: TrainConfig) -> int:
    """Return the processes that share one copy of the model."""
    parallel = config.parallel
    return parallel.tensor_size * parallel.pipeline_size * parallel.context_size


def pipeline_chunks(config: TrainConfig) -> int:
    """Return the parts that the layers are cut into."""
    return config.parallel.pipeline_size * (config.parallel.virtual_pipeline_size or 1)


def data_parallel_size(config: TrainConfig) -> int:
    """Return the copies of the model (DP)."""
    return world_size(config) // model_parallel_size(config)


def micro_batches_per_step(config: TrainConfig) -> int:
    """Return the forward passes of each process in one step."""
    optim = config.optim
    return optim.global_batch_sequences // (optim.micro_batch_sequences * data_parallel_size(config))


def derive(config: TrainConfig) -> Derived:
    """Compute all derived values of a configuration that `validate.validate` accepts."""
    model, attention, optim = config.model, config.attention, config.optim
    processes, data_parallel = world_size(config), data_parallel_size(config)
    padded_vocab = flops.padded_vocab_size(model, config.parallel.tensor_size)
    micro_batches = micro_batches_per_step(config)
    length = config.data.seq_len_tokens
    parameters = flops.count_parameters(model, padded_vocab, attention)
    dense = flops.train_flops_per_sequence(length, model, parameters, None)
    selected = flops.train_flops_per_sequence(length, model, parameters, attention)
    sequences = config.run.train_steps * optim.global_batch_sequences
    values = Derived(
        world_size=processes,
        data_parallel_size=data_parallel,
        group_heads=model.num_query_heads // model.num_kv_heads,
        padded_vocab_size=padded_vocab,
        topk_inference=_topk_inference(config),
        micro_batches_per_step=micro_batches,
        tokens_per_step=optim.global_batch_sequences * length,
        total_sequences=sequences,
        total_tokens=sequences * length,
        warmup_sequences=optim.warmup_steps * optim.global_batch_sequences,
        decay_sequences=_decay_steps(config) * optim.global_batch_sequences,
        max_documents_per_sequence=documents_limit(config.data),
        layers_per_chunk=model.num_layers // pipeline_chunks(config),
        parameters=parameters,
        flops_per_sequence_dense=dense,
        flops_per_sequence_selected=selected,
        flops_per_token_dense=dense / length,
        flops_per_token_selected=selected / length,
        sparsity_last_token_frac=flops.last_token_sparsity_frac(length, attention, attention.train_topk),
        sparsity_mean_frac=flops.mean_sparsity_frac(length, attention, attention.train_topk),
        memory=estimate_memory(config, parameters, padded_vocab, data_parallel, micro_batches),
    )
    object.__setattr__(values, "lines", tuple(print_equations.equations(config, values)))
    return values


def _topk_inference(config: TrainConfig) -> int:
    return inference_topk(config.attention) if selects_blocks(config.attention) else 0


def _decay_steps(config: TrainConfig) -> int:
    if config.optim.schedule == "cosine":
        return config.run.train_steps - config.optim.warmup_steps
    return config.optim.decay_steps
