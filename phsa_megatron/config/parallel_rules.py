"""The rules between settings of the layout; `validate.py` runs them with all others."""

from __future__ import annotations

from collections.abc import Iterator

from phsa_megatron.config.derive import model_parallel_size, pipeline_chunks, world_size
from phsa_megatron.config.rule_messages import Rule, broken, multiples_around
from phsa_megatron.config.schema import AttentionKind, ContextExchange, ContextSharding, TrainConfig
from phsa_megatron.config.selector_kinds import pools_where_keys_are


def _context_parallel(config: TrainConfig) -> Iterator[str]:
    size, length = config.parallel.context_size, config.data.seq_len_tokens
    if size == 1:
        return
    # Whole blocks fit into a chunk, so that each chunk has a fixed number of places for pooled keys.
    phsa = config.attention.kind == AttentionKind.phsa
    unit = 2 * size * (config.attention.block_tokens if phsa else 1)
    if length % unit:
        per_chunk = f" x attention.block_tokens={config.attention.block_tokens}" if phsa else ""
        yield broken(
            "data.seq_len_tokens",
            length,
            f"each of the 2 x parallel.context_size={size} chunks of a sequence is whole blocks: "
            f"a multiple of 2 x {size}{per_chunk} = {unit}",
            f"use {multiples_around(length, unit)}",
        )


def _context_exchange(config: TrainConfig) -> Iterator[str]:
    parallel = config.parallel
    sparse = parallel.context_exchange == ContextExchange.block_sparse
    if sparse and config.attention.kind == AttentionKind.dense:
        yield broken(
            "parallel.context_exchange",
            parallel.context_exchange,
            "attention.kind=dense attends to every key, and selects no blocks",
            "set parallel.context_exchange=all_gather",
        )
    elif sparse and not pools_where_keys_are(config.attention.selector):
        yield broken(
            "parallel.context_exchange",
            parallel.context_exchange,
            f"attention.selector={config.attention.selector} reads every key before it selects",
            "set parallel.context_exchange=all_gather, or attention.selector=phsa",
        )
    if parallel.context_exchange != ContextExchange.all_gather and config.monitoring.information_every_steps:
        yield broken(
            "monitoring.information_every_steps",
            config.monitoring.information_every_steps,
            f"information loss needs all keys, and parallel.context_exchange={parallel.context_exchange} may "
            "send fewer",
            "set parallel.context_exchange=all_gather, or monitoring.information_every_steps=0",
        )
    if parallel.context_sharding == ContextSharding.contiguous and config.model.mtp_num_layers:
        yield broken(
            "parallel.context_sharding",
            parallel.context_sharding,
            "megatron shifts the targets of multi-token prediction (model.mtp_num_layers="
            f"{config.model.mtp_num_layers}) between zigzag chunks",
            "set parallel.context_sharding=zigzag, or model.mtp_num_layers=0",
        )


def _context_nodes(config: TrainConfig) -> Iterator[str]:
    parallel, node_size = config.parallel, config.parallel.context_node_size
    if node_size is None:
        return
    if parallel.context_size % node_size:
        yield broken(
            "parallel.context_node_size",
            node_size,
            f"nodes have equal shares of parallel.context_size={parallel.context_size} processes",
            f"use a divisor of {parallel.context_size}, or null",
        )
    on_node = parallel.tensor_size * node_size
    if config.cluster.num_nodes > 1 and config.cluster.processes_per_node % on_node:
        yield broken(
            "parallel.context_node_size",
            node_size,
            f"parallel.tensor_size={parallel.tensor_size} x {node_size} processes lie on one node of "
            f"cluster.processes_per_node={config.cluster.processes_per_node}",
            "use a smaller node size, so that their product divides the processes of a node",
        )


def _processes_divide(config: TrainConfig) -> Iterator[str]:
    processes, model_parallel = world_size(config), model_parallel_size(config)
    if processes % model_parallel:
        parallel = config.parallel
        yield broken(
            "cluster.processes_per_node",
            config.cluster.processes_per_node,
            f"{config.cluster.num_nodes} nodes make {processes} processes, and one copy of the model takes "
            f"{parallel.tensor_size} tensor x {parallel.pipeline_size} pipeline x {parallel.context_size} "
            f"context = {model_parallel}",
            f"use a multiple of {model_parallel} processes, or smaller parallel sizes",
        )


def _batch_divides(config: TrainConfig) -> Iterator[str]:
    data_parallel = world_size(config) // model_parallel_size(config)
    batch, micro = config.optim.global_batch_sequences, config.optim.micro_batch_sequences
    if data_parallel and batch % (micro * data_parallel):
        unit = micro * data_parallel
        yield broken(
            "optim.global_batch_sequences",
            batch,
            f"it is a multiple of micro_batch_sequences={micro} x {data_parallel} data-parallel = {unit}",
            f"use {multiples_around(batch, unit)}",
        )


def _layers_divide(config: TrainConfig) -> Iterator[str]:
    layers, chunks = config.model.num_layers, pipeline_chunks(config)
    if layers % chunks:
        yield broken(
            "model.num_layers",
            layers,
            f"layers divide evenly among parallel.pipeline_size={config.parallel.pipeline_size} x "
            f"virtual_pipeline_size={config.parallel.virtual_pipeline_size or 1} = {chunks} chunks",
            "change the pipeline sizes",
        )


def _virtual_pipeline(config: TrainConfig) -> Iterator[str]:
    # With two stages, megatron's batched point-to-point messages would give wrong numbers under VPP; the
    # model factory therefore always sends them one by one (overlap_p2p_comm), and two stages are allowed
    # here.
    parallel, virtual = config.parallel, config.parallel.virtual_pipeline_size
    if virtual is None:
        return
    if parallel.pipeline_size < 2:
        yield broken(
            "parallel.virtual_pipeline_size",
            virtual,
            f"virtual stages need parallel.pipeline_size of at least 2, and it is {parallel.pipeline_size}",
            "set parallel.virtual_pipeline_size=null",
        )
        return
    data_parallel = world_size(config) // model_parallel_size(config)
    unit = config.optim.micro_batch_sequences * data_parallel
    micro_batches = config.optim.global_batch_sequences // unit if unit else 0
    if micro_batches % parallel.pipeline_size:
        yield broken(
            "parallel.virtual_pipeline_size",
            virtual,
            f"the interleaved schedule takes micro-batches in groups of pipeline_size="
            f"{parallel.pipeline_size}, and a step has {micro_batches}",
            f"set optim.global_batch_sequences to a multiple of {unit * parallel.pipeline_size}",
        )


def _tensor_parallel(config: TrainConfig) -> Iterator[str]:
    size, model = config.parallel.tensor_size, config.model
    for field, value in (
        ("model.num_kv_heads", model.num_kv_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
    ):
        if value % size:
            yield broken(
                field,
                value,
                f"it divides evenly among parallel.tensor_size={size} processes",
                f"use a tensor size that divides {value}",
            )


def _sequence_parallel(config: TrainConfig) -> Iterator[str]:
    parallel, length = config.parallel, config.data.seq_len_tokens
    if not parallel.sequence_parallel:
        return
    if parallel.tensor_size == 1:
        yield broken(
            "parallel.sequence_parallel",
            True,
            "it shards inside a tensor-parallel group, and parallel.tensor_size is 1",
            "set parallel.sequence_parallel=false or a larger tensor size",
        )
    parts = parallel.context_size * parallel.tensor_size
    if length % parts:
        context = f"parallel.context_size={parallel.context_size} x " if parallel.context_size > 1 else ""
        yield broken(
            "data.seq_len_tokens",
            length,
            f"with sequence_parallel it divides evenly among {context}"
            f"parallel.tensor_size={parallel.tensor_size}",
            f"use a multiple of {parts}" if context else "use a multiple of the tensor size",
        )


def _experts(config: TrainConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    size, processes = parallel.expert_size, world_size(config)
    if not model.num_experts:
        if size > 1:
            yield broken(
                "parallel.expert_size",
                size,
                "there are no experts to share (model.num_experts=0)",
                "set parallel.expert_size=1, or model.num_experts",
            )
        return
    if model.expert_topk > model.num_experts:
        yield broken(
            "model.expert_topk",
            model.expert_topk,
            f"a token uses different experts, and model.num_experts={model.num_experts}",
            f"use at most {model.num_experts}",
        )
    if model.num_experts % size:
        yield broken(
            "parallel.expert_size",
            size,
            f"model.num_experts={model.num_experts} divide evenly among its processes",
            f"use a divisor of {model.num_experts}",
        )
    share = processes // parallel.pipeline_size
    if share and share % size:
        yield broken(
            "parallel.expert_size",
            size,
            f"it divides the processes of a pipeline stage, which are {share}",
            f"use a divisor of {share}",
        )
    if parallel.tensor_size > 1 and size == 1:
        yield broken(
            "parallel.expert_size",
            1,
            f"experts are whole, and with parallel.tensor_size={parallel.tensor_size} megatron sums their "
            "gradients over all processes that hold them only if several processes share the experts",
            "set parallel.expert_size=2 or more, or parallel.tensor_size=1",
        )
    if parallel.tensor_size > 1 and not parallel.sequence_parallel:
        yield broken(
            "parallel.sequence_parallel",
            False,
            f"experts with parallel.tensor_size={parallel.tensor_size} take their tokens from "
            "sequence-parallel processes: megatron trains them only so",
            "set parallel.sequence_parallel=true",
        )


def _overlap(config: TrainConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield broken(
            "parallel.overlap_param_gather",
            True,
            "it gathers the shards of the distributed optimizer",
            "set parallel.distributed_optimizer=true, or parallel.overlap_param_gather=false",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield broken(
            "parallel.overlap_param_gather",
            True,
            "megatron gathers during the forward pass only if it also reduces during the backward pass",
            "set parallel.overlap_grad_reduce=true, or parallel.overlap_param_gather=false",
        )


PARALLEL_RULES: tuple[Rule, ...] = (
    _context_parallel,
    _context_exchange,
    _context_nodes,
    _processes_divide,
    _batch_divides,
    _layers_divide,
    _virtual_pipeline,
    _tensor_parallel,
    _sequence_parallel,
    _experts,
    _overlap,
)
"""All of them, in the order of their messages."""
