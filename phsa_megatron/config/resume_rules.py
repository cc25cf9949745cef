"""What may change between a checkpoint and the run that goes on from it, and why the rest may not.

`diff` compares two configurations key by key; every key of the schema has a rule, and a test asserts it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phsa_megatron.config import keys
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import Selector, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector
from phsa_megatron.config.yaml_file import leaves


@dataclass(frozen=True)
class ResumeRule:
    """What follows from changing a setting on resume.

    Attributes:
        allowed: whether the run may go on.
        consequence: what the change does, or would do.
    """

    allowed: bool
    consequence: str


_LABEL = ResumeRule(True, "a name for people")
_HERE = ResumeRule(True, "takes effect from the next step")
_ROUNDING = ResumeRule(True, "same mathematics; sums are rounded in another order, so bits differ")
_WATCHING = ResumeRule(True, "changes what is measured or kept, not the training")
_STARTING = ResumeRule(True, "changes where and how processes start, not what they compute")
_SHAPE = ResumeRule(False, "the weights in the checkpoint have another shape")
_MODEL = ResumeRule(False, "the weights were trained for another function of their inputs")
_ATTENTION = ResumeRule(
    False, "the loss curve would mix two attentions; start a new stage with run.init_from=RUN"
)
_ORDER = ResumeRule(False, "the order of the data would change: texts would be repeated or left out unseen")
_TOKENS = ResumeRule(False, "the same token ids would stand for other texts, or sequences for other tokens")
_UNUSED = ResumeRule(
    False, "it is used only when a run starts, so the new value would be recorded but not used"
)
_SCHEDULE = ResumeRule(
    True, "the learning rate follows the new curve from the next step on, and may jump there"
)
_LAYOUT = ResumeRule(
    True, "checkpoints do not depend on the layout; sums are rounded in another order, so bits differ"
)

RULES: dict[str, ResumeRule] = {
    "run.name": _LABEL,
    "run.root_dir": _LABEL,
    "run.seed": _ORDER,
    "run.train_steps": ResumeRule(
        True, "the run ends elsewhere; decay (wsd) or the whole curve (cosine) moves with the end"
    ),
    "run.dtype": ResumeRule(False, "weights and optimizer state are stored for the other dtype"),
    "run.num_threads": _ROUNDING,
    "run.init_from": _UNUSED,
    "run.sample_prompts": _WATCHING,
    "run.sample_num_tokens": _WATCHING,
    "model.name": _LABEL,
    "model.num_layers": _SHAPE,
    "model.hidden_size": _SHAPE,
    "model.ffn_hidden_size": _SHAPE,
    "model.num_query_heads": _SHAPE,
    "model.num_kv_heads": _SHAPE,
    "model.head_dim": _SHAPE,
    "model.vocab_size": _SHAPE,
    "model.vocab_pad_multiple": _SHAPE,
    "model.tie_embeddings": _SHAPE,
    "model.qk_norm": _SHAPE,
    "model.rope_base": _MODEL,
    "model.norm_eps": _MODEL,
    "model.init_std": _UNUSED,
    "model.num_experts": _SHAPE,
    "model.expert_topk": _MODEL,
    "model.expert_balance_coeff": _HERE,
    "model.mtp_num_layers": _SHAPE,
    "attention.kind": _ATTENTION,
    "attention.selector": _ATTENTION,
    "attention.impl": _ROUNDING,
    "attention.block_tokens": _ATTENTION,
    "attention.init_tokens": _ATTENTION,
    "attention.local_tokens": _ATTENTION,
    "attention.train_topk": _ATTENTION,
    "attention.infer_topk": ResumeRule(
        True, "validation loss before and after the change cannot be compared; training is untouched"
    ),
    "attention.mean_weight_frac": _ATTENTION,
    "attention.group_score": _ATTENTION,
    "attention.punctuation_match": _ATTENTION,
    "attention.punctuation_language": _ATTENTION,
    "attention.dense_len_tokens": _ATTENTION,
    "attention.control_seed": _ATTENTION,
    "attention.coarse_lse": _ATTENTION,
    "attention.select_impl": _ROUNDING,
    "attention.dense_layers": _ATTENTION,
    "attention.topk_schedule": _ATTENTION,
    "attention.topk_dense_steps": _ATTENTION,
    "attention.topk_start": _ATTENTION,
    "attention.topk_anneal_steps": _ATTENTION,
    "attention.topk_choices": _ATTENTION,
    "attention.nsa_window_tokens": _ATTENTION,
    "attention.indexer_heads": _ATTENTION,
    "attention.indexer_coeff": _HERE,
    "attention.align_coeff": _HERE,
    "attention.align_full_frac": _HERE,
    "data.name": _LABEL,
    "data.seq_len_tokens": _ORDER,
    "data.tokenizer_file": _TOKENS,
    "data.eod_token": _TOKENS,
    "data.isolate_documents": _ATTENTION,
    "data.max_documents_per_sequence": _TOKENS,
    "data.skip_sequences": ResumeRule(
        True, "sequences ahead are passed over; a change behind the checkpoint is refused when it is loaded"
    ),
    "data.sources": _ORDER,
    "data.sources.*.weight": _ORDER,
    "data.sources.*.domain": _WATCHING,
    "data.sources.*.train_prefix": _ORDER,
    "data.sources.*.valid_prefix": _WATCHING,
    "parallel.tensor_size": _LAYOUT,
    "parallel.pipeline_size": _LAYOUT,
    "parallel.virtual_pipeline_size": _LAYOUT,
    "parallel.context_size": _LAYOUT,
    "parallel.context_exchange": _ROUNDING,
    "parallel.context_sharding": _LAYOUT,
    "parallel.context_node_size": _ROUNDING,
    "parallel.expert_size": _LAYOUT,
    "parallel.sequence_parallel": _LAYOUT,
    "parallel.distributed_optimizer": ResumeRule(
        False, "the optimizer state is stored in another form with and without it"
    ),
    "parallel.overlap_grad_reduce": _LAYOUT,
    "parallel.overlap_param_gather": _LAYOUT,
    "parallel.recompute": _ROUNDING,
    "parallel.recompute_layers": _ROUNDING,
    "compute.loss": _ROUNDING,
    "compute.loss_chunk_tokens": _ROUNDING,
    "compute.elementwise": _ROUNDING,
    "compute.norm": _ROUNDING,
    "compute.cuda_graphs": ResumeRule(True, "the same kernels in the same order: not a bit changes"),
    "compute.adam": _ROUNDING,
    "compute.fused_weight_gradient": _ROUNDING,
    "compute.layers": ResumeRule(False, "the norms' weights have other names in the checkpoint"),
    "compute.fp8": ResumeRule(True, "products are rounded to FP8 from the next step on, or no longer"),
    "optim.global_batch_sequences": ResumeRule(
        True,
        "the data goes on after the sequences consumed so far, none repeated or left out; the learning-rate "
        "curve, which counts sequences, is re-measured with the new batch and may jump",
    ),
    "optim.micro_batch_sequences": ResumeRule(
        True,
        "same mathematics, sums are rounded in another order; but with experts the balance loss is that of "
        "each micro-batch, so it changes too",
    ),
    "optim.lr": _SCHEDULE,
    "optim.min_lr": _SCHEDULE,
    "optim.schedule": _SCHEDULE,
    "optim.warmup_steps": _SCHEDULE,
    "optim.decay_steps": _SCHEDULE,
    "optim.weight_decay": _HERE,
    "optim.adam_beta1": _HERE,
    "optim.adam_beta2": _HERE,
    "optim.adam_eps": _HERE,
    "optim.clip_grad_norm": _HERE,
    "checkpoint.save_every_steps": _WATCHING,
    "checkpoint.keep_last": _WATCHING,
    "checkpoint.async_save": _WATCHING,
    "checkpoint.local_copy_dir": _WATCHING,
    "evaluate.every_steps": _WATCHING,
    "evaluate.num_sequences_per_domain": _WATCHING,
    "evaluate.micro_batch_sequences": _WATCHING,
    "cluster.name": _LABEL,
    "cluster.device": _ROUNDING,
    "cluster.num_nodes": _LAYOUT,
    "cluster.processes_per_node": _LAYOUT,
    "cluster.peak_tflops": _WATCHING,
    "cluster.memory_gib": _WATCHING,
    "cluster.scheduler": _STARTING,
    "cluster.python": _STARTING,
    "cluster.environment": _STARTING,
    "cluster.environment.*": _STARTING,
    "cluster.partition": _STARTING,
    "cluster.account": _STARTING,
    "cluster.qos": _STARTING,
    "cluster.gpus_per_node": _STARTING,
    "cluster.time_limit": _STARTING,
    "cluster.constraint": _STARTING,
    "cluster.stop_lead_s": _STARTING,
    "cluster.max_failures_without_progress": _STARTING,
    "cluster.requeue": _STARTING,
    "cluster.chain": _STARTING,
    "cluster.preflight": _STARTING,
    "cluster.setup_lines": _STARTING,
    "cluster.sbatch": _STARTING,
    "cluster.sbatch.*": _STARTING,
    "cluster.container_image": _STARTING,
    "cluster.container_mounts": _STARTING,
    "monitoring.log_every_steps": _WATCHING,
    "monitoring.information_every_steps": _WATCHING,
    "monitoring.information_rows": _WATCHING,
    "monitoring.max_logit_every_steps": _WATCHING,
    "monitoring.max_logit_rows": _WATCHING,
    "monitoring.norms_every_steps": _WATCHING,
    "monitoring.progress": _WATCHING,
    "monitoring.tensorboard": _WATCHING,
    "monitoring.nvtx": _WATCHING,
    "monitoring.profile.first_step": _WATCHING,
    "monitoring.profile.num_steps": _WATCHING,
    "monitoring.profile.memory": _WATCHING,
    "monitoring.report": _WATCHING,
    "monitoring.wandb.mode": _WATCHING,
    "monitoring.wandb.project": _WATCHING,
    "monitoring.wandb.entity": _WATCHING,
    **{
        f"monitoring.alerts.{name}": _WATCHING
        for name in (
            "enabled",
            "loss_spike_nats",
            "loss_spike_sigmas",
            "throughput_drop_frac",
            "straggler_ratio",
            "patience_records",
            "stall_frac",
        )
    },
    "health.watchdog": _WATCHING,
    "health.heartbeat_every_s": _WATCHING,
    "health.start_timeout_s": _WATCHING,
    "health.first_step_timeout_s": _WATCHING,
    "health.step_timeout_s": _WATCHING,
    "health.data_timeout_s": _WATCHING,
    "health.long_phase_timeout_s": _WATCHING,
    "health.resiliency": _WATCHING,
    "health.gpu_scores_every_steps": _WATCHING,
    "health.preflight_timeout_s": _WATCHING,
    "health.min_free_memory_gib": _WATCHING,
    "health.min_free_gpu_memory_frac": _WATCHING,
    "health.min_free_disk_gib": _WATCHING,
    "health.min_write_mib_per_s": _WATCHING,
    "health.max_gpu_temperature_c": _WATCHING,
    "health.max_clock_skew_s": _WATCHING,
    "health.max_all_reduce_s": _WATCHING,
}

SHAPE_KEYS = tuple(key for key, rule in RULES.items() if rule is _SHAPE and key != "model.vocab_pad_multiple")
"""Settings that a new stage must share with the run whose weights it starts from."""

ABSENT = "(absent)"
"""Stands for the value of a source's setting where the source is not in the mixture."""


@dataclass(frozen=True)
class Change:
    """One setting that differs.

    Attributes:
        key: dotted key.
        old: value in the run that left the checkpoint.
        new: value now.
        rule: whether it may change and what follows.
    """

    key: str
    old: Any
    new: Any
    rule: ResumeRule

    def __str__(self) -> str:
        verdict = "allowed" if self.rule.allowed else "REFUSED"
        return f"{self.key}: {self.old} -> {self.new}  [{verdict}: {self.rule.consequence}]"


@dataclass(frozen=True)
class ConfigDiff:
    """All settings that differ between two configurations."""

    changes: tuple[Change, ...]

    @property
    def refused(self) -> tuple[Change, ...]:
        """The changes that a resume may not make."""
        return tuple(change for change in self.changes if not change.rule.allowed)

    def table(self) -> str:
        """Return one line a change: key, old and new value, whether it is allowed and what follows."""
        return "\n".join(f"  {change}" for change in self.changes)

    def require_resumable(self, old_name: str) -> None:
        """Stop if a change may not be made.

        Args:
            old_name: what the old configuration belongs to, for the message.

        Raises:
            ConfigError: naming every refused change, its consequence and the two ways out.
        """
        if self.refused:
            lines = "\n".join(f"  {change}" for change in self.refused)
            raise ConfigError(
                f"this run cannot resume {old_name}:\n{lines}\n"
                "Set these back to resume, or choose another run.name (with run.init_from=RUN to start from "
                "its weights)."
            )


def diff(old: TrainConfig, new: TrainConfig) -> ConfigDiff:
    """Compare the configuration of a checkpoint with the one that is about to resume from it."""
    before, after = (dict(leaves(asdict(config))) for config in (old, new))
    changes = []
    for key in [*before, *(key for key in after if key not in before)]:
        a, b = before.get(key, ABSENT), after.get(key, ABSENT)
        if a != b:
            changes.append(Change(key, a, b, _rule(key, added_or_removed=ABSENT in (a, b))))
    return ConfigDiff(tuple(changes))


def check_new_stage(parent: TrainConfig, new: TrainConfig) -> None:
    """Check that a run can start from another run's weights: only shapes must agree.

    Raises:
        ConfigError: naming the settings that give the weights another shape.
    """
    before, after = (dict(leaves(asdict(config))) for config in (parent, new))
    shapes = list(SHAPE_KEYS)
    if learned_selector(parent.attention) == learned_selector(new.attention) == Selector.indexer:
        shapes.append("attention.indexer_heads")
    wrong = [f"  {key}: {before[key]} -> {after[key]}" for key in shapes if before[key] != after[key]]
    if wrong:
        raise ConfigError(
            f"run.init_from={new.run.init_from}: its weights have another shape:\n"
            + "\n".join(wrong)
            + "\nChoose the same model, or start without run.init_from."
        )


def _rule(key: str, added_or_removed: bool) -> ResumeRule:
    if key.startswith("data.sources.") and added_or_removed:
        return RULES["data.sources"]
    field = keys.find(key)
    assert field is not None, key
    return RULES[field.key]
