"""Every rule between settings, one small function each, and one message for all that are broken.

A rule yields messages made by `_broken`: field, value, rule and fix. Ranges of single numbers are in
`ranges.py`, rules of the cluster in `validate_cluster.py`; types and names earlier, by the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from phsa_megatron.config import keys
from phsa_megatron.config.derive import model_parallel_size, pipeline_chunks, world_size
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.errors import broken_rule as _broken
from phsa_megatron.config.ranges import RANGES
from phsa_megatron.config.schema import AttentionKind, Device, KernelImpl, LrSchedule, TrainConfig
from phsa_megatron.config.validate_cluster import CLUSTER_RULES
from phsa_megatron.config.yaml_file import leaves

Rule = Callable[[TrainConfig], Iterator[str]]


def validate(config: TrainConfig) -> None:
    """Check all rules.

    Raises:
        ConfigError: with one line for each broken rule.
    """
    broken = list(_ranges(config))
    # Rules divide and compare: they run only on numbers that make sense by themselves.
    if not broken:
        broken = [message for rule in RULES for message in rule(config)]
    if broken:
        raise ConfigError("\n".join(broken))


def _multiples_around(number: int, unit: int) -> str:
    """The positive multiples of `unit` next to `number`: one if `number` is smaller than `unit`."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _ranges(config: TrainConfig) -> Iterator[str]:
    values: dict[str, Any] = dict(leaves(asdict(config)))
    for key, value in values.items():
        field = keys.find(key)
        allowed = RANGES.get(field.key) if field else None
        if allowed is not None and value is not None and not allowed.holds(value):
            yield _broken(key, value, f"it must be {allowed}", f"set {key} accordingly")


def _run_name(config: TrainConfig) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.run.name):
        yield _broken(
            "run.name",
            repr(config.run.name),
            "it names a folder: letters, digits, '.', '_' and '-', not starting with a sign",
            "choose another name",
        )


def _topk(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    for name, k in (("train_topk", attention.train_topk), ("infer_topk", attention.infer_topk)):
        if k is not None and k < 1:
            yield _broken(
                f"attention.{name}",
                k,
                "a query selects at least one block",
                f"set attention.{name}=1 or more; for attention without selection use attention.kind=dense",
            )


def _heads_divide(config: TrainConfig) -> Iterator[str]:
    query, kv = config.model.num_query_heads, config.model.num_kv_heads
    if query % kv:
        yield _broken(
            "model.num_query_heads",
            query,
            f"query heads divide evenly among model.num_kv_heads={kv}",
            f"use {_multiples_around(query, kv)} query heads",
        )


def _head_group(config: TrainConfig) -> Iterator[str]:
    query, kv = config.model.num_query_heads, config.model.num_kv_heads
    if config.attention.kind == AttentionKind.phsa and query % kv == 0 and query // kv > 16:
        yield _broken(
            "model.num_kv_heads",
            kv,
            f"{query} query heads make groups of {query // kv}, and PHSA serves groups of 1 to 16",
            f"use at least {-(-query // 16)} key-value heads",
        )


def _head_dim_even(config: TrainConfig) -> Iterator[str]:
    if config.model.head_dim % 2:
        yield _broken(
            "model.head_dim",
            config.model.head_dim,
            "RoPE turns pairs of channels",
            "use an even number",
        )


def _windows(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.kind == AttentionKind.dense:
        return
    m = attention.block_tokens
    for name, tokens in (("init_tokens", attention.init_tokens), ("local_tokens", attention.local_tokens)):
        if tokens % m and not (name == "local_tokens" and tokens < m):
            yield _broken(
                f"attention.{name}",
                tokens,
                f"windows are whole blocks of attention.block_tokens={m}",
                f"use {tokens // m * m} or {(tokens // m + 1) * m}",
            )
    if attention.local_tokens < m:
        yield _broken(
            "attention.local_tokens",
            attention.local_tokens,
            f"the current block of attention.block_tokens={m} is always attended to",
            f"use at least {m}",
        )


def _sequence_and_block(config: TrainConfig) -> Iterator[str]:
    length, m = config.data.seq_len_tokens, config.attention.block_tokens
    if config.attention.kind == AttentionKind.phsa and length < m:
        yield _broken(
            "data.seq_len_tokens",
            length,
            f"a sequence holds at least one block of attention.block_tokens={m}",
            f"use at least {m}",
        )


def _max_documents(config: TrainConfig) -> Iterator[str]:
    most, length = config.data.max_documents_per_sequence, config.data.seq_len_tokens
    if most is not None and most > length:
        yield _broken(
            "data.max_documents_per_sequence",
            most,
            f"a sequence of data.seq_len_tokens={length} holds at most that many documents",
            f"use at most {length}, or null",
        )


def _sources(config: TrainConfig) -> Iterator[str]:
    weights = [source.weight for source in config.data.sources.values()]
    if not any(weight > 0 for weight in weights):
        yield _broken(
            "data.sources",
            f"{len(weights)} sources",
            "at least one source has a positive weight",
            "choose a mixture (data=NAME) or set data.sources.NAME.weight",
        )


def _validation_text(config: TrainConfig) -> Iterator[str]:
    every = config.evaluate.every_steps
    if every > 0 and not any(source.valid_prefix for source in config.data.sources.values()):
        yield _broken(
            "evaluate.every_steps",
            every,
            "evaluation needs a source with validation text, and none has a valid_prefix",
            "set data.sources.NAME.valid_prefix, or evaluate.every_steps=0",
        )


def _context_parallel(config: TrainConfig) -> Iterator[str]:
    size, length = config.parallel.context_size, config.data.seq_len_tokens
    if size == 1:
        return
    # Whole blocks fit into a chunk, so that each chunk has a fixed number of places for pooled keys.
    phsa = config.attention.kind == AttentionKind.phsa
    unit = 2 * size * (config.attention.block_tokens if phsa else 1)
    if length % unit:
        per_chunk = f" x attention.block_tokens={config.attention.block_tokens}" if phsa else ""
        yield _broken(
            "data.seq_len_tokens",
            length,
            f"each of the 2 x parallel.context_size={size} chunks of a sequence is whole blocks: "
            f"a multiple of 2 x {size}{per_chunk} = {unit}",
            f"use {_multiples_around(length, unit)}",
        )
    if config.model.mtp_num_layers:
        yield _broken(
            "model.mtp_num_layers",
            config.model.mtp_num_layers,
            f"multi-token prediction is not verified with parallel.context_size={size}",
            "set model.mtp_num_layers=0, or parallel.context_size=1",
        )


def _processes_divide(config: TrainConfig) -> Iterator[str]:
    processes, model_parallel = world_size(config), model_parallel_size(config)
    if processes % model_parallel:
        parallel = config.parallel
        yield _broken(
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
        yield _broken(
            "optim.global_batch_sequences",
            batch,
            f"it is a multiple of micro_batch_sequences={micro} x {data_parallel} data-parallel = {unit}",
            f"use {_multiples_around(batch, unit)}",
        )


def _layers_divide(config: TrainConfig) -> Iterator[str]:
    layers, chunks = config.model.num_layers, pipeline_chunks(config)
    if layers % chunks:
        yield _broken(
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
        yield _broken(
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
        yield _broken(
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
            yield _broken(
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
        yield _broken(
            "parallel.sequence_parallel",
            True,
            "it shards inside a tensor-parallel group, and parallel.tensor_size is 1",
            "set parallel.sequence_parallel=false or a larger tensor size",
        )
    parts = parallel.context_size * parallel.tensor_size
    if length % parts:
        context = f"parallel.context_size={parallel.context_size} x " if parallel.context_size > 1 else ""
        yield _broken(
            "data.seq_len_tokens",
            length,
            f"with sequence_parallel it divides evenly among {context}"
            f"parallel.tensor_size={parallel.tensor_size}",
            f"use a multiple of {parts}" if context else "use a multiple of the tensor size",
        )


def _overlap(config: TrainConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not parallel.distributed_optimizer:
        yield _broken(
            "parallel.overlap_param_gather",
            True,
            "it gathers the shards of the distributed optimizer",
            "set parallel.distributed_optimizer=true, or parallel.overlap_param_gather=false",
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield _broken(
            "parallel.overlap_param_gather",
            True,
            "megatron gathers during the forward pass only if it also reduces during the backward pass",
            "set parallel.overlap_grad_reduce=true, or parallel.overlap_param_gather=false",
        )


def _device_and_impl(config: TrainConfig) -> Iterator[str]:
    impl, device = config.attention.impl, config.cluster.device
    if impl == KernelImpl.triton and device == Device.cpu:
        yield _broken(
            "attention.impl",
            impl,
            "Triton kernels need a GPU, and cluster.device is cpu",
            "set attention.impl=reference or cluster.device=cuda",
        )


def _schedule_lengths(config: TrainConfig) -> Iterator[str]:
    optim, steps = config.optim, config.run.train_steps
    if optim.warmup_steps + optim.decay_steps > steps:
        yield _broken(
            "optim.warmup_steps",
            optim.warmup_steps,
            f"warm-up and optim.decay_steps={optim.decay_steps} fit into run.train_steps={steps}",
            "shorten one of them, or train for more steps",
        )


def _cosine(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    if optim.schedule == LrSchedule.cosine and optim.decay_steps:
        yield _broken(
            "optim.decay_steps",
            optim.decay_steps,
            "optim.schedule=cosine decays over all steps after the warm-up",
            "set optim.decay_steps=0, or optim.schedule=wsd",
        )


def _learning_rates(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    if optim.min_lr > optim.lr:
        yield _broken(
            "optim.min_lr", optim.min_lr, f"it is at most optim.lr={optim.lr}", "lower it, or raise optim.lr"
        )


RULES: tuple[Rule, ...] = (
    _run_name,
    _topk,
    _heads_divide,
    _head_group,
    _head_dim_even,
    _windows,
    _sequence_and_block,
    _max_documents,
    _sources,
    _validation_text,
    _context_parallel,
    _processes_divide,
    _batch_divides,
    _layers_divide,
    _virtual_pipeline,
    _tensor_parallel,
    _sequence_parallel,
    _overlap,
    _device_and_impl,
    _schedule_lengths,
    _cosine,
    _learning_rates,
    *CLUSTER_RULES,
)
"""All rules, in the order of their messages."""
