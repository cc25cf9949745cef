"""The allowed range of every number in the schema; a test asserts that none is left out."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """An interval of allowed values.

    Attributes:
        low: smallest allowed value, or what the value must exceed if `above`.
        high: largest allowed value, or what the value must stay under if `below`.
        above: whether `low` itself is refused.
        below: whether `high` itself is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Return whether a value is allowed; nan and infinities never are."""
        if not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return low and high

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'more than' if self.above else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'less than' if self.below else 'at most'} {self.high:g}")
        return " and ".join(parts) or "a finite number"


_FROM_ZERO = Range(0)
_FROM_ONE = Range(1)
_POSITIVE = Range(0, above=True)
_FRAC = Range(0, 1)
_DECAY = Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "run.seed": Range(0, 2**31 - 1),
    "run.train_steps": _FROM_ONE,
    "run.num_threads": _FROM_ZERO,
    "run.sample_num_tokens": _FROM_ONE,
    "model.num_layers": _FROM_ONE,
    "model.hidden_size": _FROM_ONE,
    "model.ffn_hidden_size": _FROM_ONE,
    "model.num_query_heads": _FROM_ONE,
    "model.num_kv_heads": _FROM_ONE,
    "model.head_dim": Range(2),
    "model.vocab_size": Range(2),
    "model.vocab_pad_multiple": _FROM_ONE,
    "model.rope_base": Range(1, above=True),
    "model.norm_eps": _POSITIVE,
    "model.init_std": _POSITIVE,
    "model.num_experts": _FROM_ZERO,
    "model.expert_topk": Range(2),
    "model.expert_balance_coeff": _FROM_ZERO,
    "model.mtp_num_layers": _FROM_ZERO,
    "attention.block_tokens": _FROM_ONE,
    "attention.init_tokens": _FROM_ZERO,
    "attention.local_tokens": _FROM_ONE,
    "attention.mean_weight_frac": _FRAC,
    "attention.dense_len_tokens": _FROM_ZERO,
    "attention.control_seed": Range(0, 2**31 - 1),
    "attention.nsa_window_tokens": _FROM_ONE,
    "attention.indexer_heads": _FROM_ONE,
    "attention.indexer_coeff": _POSITIVE,
    "attention.align_coeff": _FROM_ZERO,
    "attention.align_full_frac": _FRAC,
    "attention.topk_dense_steps": _FROM_ZERO,
    "attention.topk_start": _FROM_ONE,
    "attention.topk_anneal_steps": _FROM_ZERO,
    "data.seq_len_tokens": Range(2),
    "data.max_documents_per_sequence": _FROM_ONE,
    "data.sources.*.weight": _FROM_ZERO,
    "parallel.tensor_size": _FROM_ONE,
    "parallel.pipeline_size": _FROM_ONE,
    "parallel.context_size": _FROM_ONE,
    "parallel.context_node_size": _FROM_ONE,
    "parallel.expert_size": _FROM_ONE,
    "parallel.virtual_pipeline_size": Range(2),
    "parallel.recompute_layers": _FROM_ONE,
    "compute.loss_chunk_tokens": _FROM_ONE,
    "optim.global_batch_sequences": _FROM_ONE,
    "optim.micro_batch_sequences": _FROM_ONE,
    "optim.lr": _POSITIVE,
    "optim.min_lr": _FROM_ZERO,
    "optim.warmup_steps": _FROM_ZERO,
    "optim.decay_steps": _FROM_ZERO,
    "optim.weight_decay": _FROM_ZERO,
    "optim.adam_beta1": _DECAY,
    "optim.adam_beta2": _DECAY,
    "optim.adam_eps": _POSITIVE,
    "optim.clip_grad_norm": _FROM_ZERO,
    "checkpoint.save_every_steps": _FROM_ZERO,
    "checkpoint.keep_last": _FROM_ONE,
    "evaluate.every_steps": _FROM_ZERO,
    "evaluate.num_sequences_per_domain": _FROM_ONE,
    "evaluate.micro_batch_sequences": _FROM_ONE,
    "cluster.num_nodes": _FROM_ONE,
    "cluster.processes_per_node": _FROM_ONE,
    "cluster.peak_tflops": _POSITIVE,
    "cluster.memory_gib": _POSITIVE,
    "cluster.gpus_per_node": _FROM_ONE,
    "cluster.stop_lead_s": Range(10, 65535),
    "cluster.max_failures_without_progress": _FROM_ONE,
    "cluster.chain": Range(1, 1000),
    "monitoring.log_every_steps": _FROM_ONE,
    "health.heartbeat_every_s": _POSITIVE,
    "health.start_timeout_s": _POSITIVE,
    "health.first_step_timeout_s": _POSITIVE,
    "health.step_timeout_s": _POSITIVE,
    "health.data_timeout_s": _POSITIVE,
    "health.long_phase_timeout_s": _POSITIVE,
    "health.gpu_scores_every_steps": _FROM_ZERO,
    "health.preflight_timeout_s": _POSITIVE,
    "health.min_free_memory_gib": _FROM_ZERO,
    "health.min_free_gpu_memory_frac": _FRAC,
    "health.min_free_disk_gib": _FROM_ZERO,
    "health.min_write_mib_per_s": _FROM_ZERO,
    "health.max_gpu_temperature_c": _POSITIVE,
    "health.max_clock_skew_s": _POSITIVE,
    "health.max_all_reduce_s": _POSITIVE,
    "monitoring.information_every_steps": _FROM_ZERO,
    "monitoring.information_rows": _FROM_ONE,
    "monitoring.max_logit_every_steps": _FROM_ZERO,
    "monitoring.max_logit_rows": _FROM_ONE,
    "monitoring.norms_every_steps": _FROM_ZERO,
    "monitoring.profile.first_step": _FROM_ZERO,
    "monitoring.profile.num_steps": _FROM_ONE,
    "monitoring.alerts.loss_spike_nats": _FROM_ZERO,
    "monitoring.alerts.loss_spike_sigmas": _FROM_ZERO,
    "monitoring.alerts.throughput_drop_frac": Range(0, 1, above=True, below=True),
    "monitoring.alerts.straggler_ratio": Range(1, above=True),
    "monitoring.alerts.patience_records": _FROM_ONE,
    "monitoring.alerts.stall_frac": Range(0, 1, above=True),
}

EXPLAINED_ELSEWHERE = {
    "attention.train_topk",
    "attention.infer_topk",
}
"""Numbers whose rule in `validate.py` says more than a range could."""
