"""The plan's step of a run under context parallelism, and the same step with a measured attention in it."""

from __future__ import annotations

from unittest import mock

from phsa_megatron.config.planning import step_time
from phsa_megatron.config.planning.context_time import process_attention
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.run_to_plan import run_to_plan
from phsa_megatron.config.planning.search import Estimator

RECIPES = {
    (16, 8): "phsa_0p6b_pretrain_8gpu_h100_bf16_32k",
    (32, 8): "phsa_8b_pretrain_8gpu_h100_bf16_32k",
}


def planned(heads, topk, seq_len, size, exchange="all_gather", sharding="zigzag"):
    """The plan's config of a run under CP = `size`, without tensor parallelism."""
    tensor = ["parallel.tensor_size=1", "parallel.sequence_parallel=false", "parallel.recompute=none"]
    return run_to_plan([
        f"recipe={RECIPES[heads]}", f"data.seq_len_tokens={seq_len}", f"attention.train_topk={topk}",
        f"parallel.context_exchange={exchange}", f"parallel.context_sharding={sharding}",
        f"parallel.context_size={size}", f"cluster.processes_per_node={size}", *tensor,
        "optim.global_batch_sequences=1", "parallel.distributed_optimizer=true",
    ])  # fmt: skip


def projection(heads, topk, seq_len, size, measured, exchange="all_gather", sharding="zigzag"):
    """The plan's attention and step, and its step with the measured attention (an AttentionTime)."""
    config = planned(heads, topk, seq_len, size, exchange, sharding)
    machine = Machine.of(config)
    own = process_attention(config, machine)
    plan = Estimator(config, machine).estimate(config)
    with mock.patch.object(step_time, "process_attention", lambda *_: measured):
        projected = Estimator(config, machine).estimate(config)
    return {
        "plan_fwd_ms": own.forward_ms, "plan_fwd_bwd_ms": own.forward_ms + own.backward_ms,
        "plan_select_ms": own.select_ms, "plan_step_s": plan.time.step_s,
        "projected_step_s": projected.time.step_s, "plan_tokens_per_s": plan.tokens_per_s,
        "projected_tokens_per_s": projected.tokens_per_s, "plan_memory_gib": plan.memory.total_gib,
        "plan_fits": plan.fits, "plan_step_shares": plan.time.shares(), "plan_notes": own.notes,
    }  # fmt: skip
