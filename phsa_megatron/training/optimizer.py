"""The parts that a step moves: the wrapped model, its optimizer and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from phsa_megatron.config.derive import Derived, derive
from phsa_megatron.config.errors import TrainingError
from phsa_megatron.config.schema import CudaGraphs, Dtype, LrSchedule, TrainConfig
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import group_step_adam
from phsa_megatron.training.micro_batch_graph import MicroBatchGraph

_DECAY_STYLE = {LrSchedule.wsd: "WSD", LrSchedule.cosine: "cosine"}


@dataclass
class Parts:
    """What a step changes, and what it needs to know."""

    model: list[DistributedDataParallel]
    """The model chunks of this process (one, or one per virtual pipeline stage), in their DDP wrappers."""
    optimizer: ChainedOptimizer
    """AdamW over all chunks; with the distributed optimizer each data-parallel process holds a shard."""
    scheduler: OptimizerParamScheduler
    """Learning rate and weight decay by consumed sequences."""
    groups: Groups
    """Process groups."""
    config: TrainConfig
    """The run."""
    derived: Derived
    """Values that follow from it."""
    graph: MicroBatchGraph | None = None
    """Replays the passes of training steps, with `compute.cuda_graphs`."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Returns the bare GPT models, without their data-parallel and bf16 wrappers."""
        bare = []
        for chunk in self.model:
            module: torch.nn.Module = chunk
            while isinstance(module, DistributedDataParallel | Float16Module):
                module = module.module
            bare.append(module)
        return bare

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yields this process's parameters in model order; of several chunks, names start with the chunk."""
        for i, module in enumerate(self.modules):
            prefix = f"chunk{i}." if len(self.model) > 1 else ""
            for name, parameter in module.named_parameters():
                yield prefix + name, parameter

    def gradient_sums(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the fp32 gradient sums of this process's parameters, in model order.

        After the backward pass they are reduced and divided by the number of tokens; with the distributed
        optimizer only this process's shard of each is.
        """
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter.main_grad  # type: ignore[attr-defined]  # megatron's DDP puts it there

    def zero_grad(self) -> None:
        """Clears the gradient sums before a step."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @contextmanager
    def known_norm(self, grad_norm: float, *, count_zeros: bool) -> Iterator[None]:
        """Lets the optimizer's step clip by a norm that is known already, instead of measuring it again.

        Args:
            grad_norm: global L2 norm of the prepared gradients.
            count_zeros: also count the gradient elements that are zero: two launches for every parameter.
        """
        self.optimizer.config.log_num_zeros_in_grad = count_zeros
        self.optimizer.get_grad_norm = lambda: grad_norm  # hides the method
        try:
            yield
        finally:
            del self.optimizer.get_grad_norm

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """Holds all weights up to date, outside of a training step.

        With `overlap_param_gather` the weights of other processes' shards arrive only when the next training
        forward asks for them; evaluation, saving and generation must not see the old ones.
        """
        if not self.config.parallel.overlap_param_gather:
            yield
            return
        for chunk in self.model:
            chunk.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for chunk in self.model:
                chunk.enable_forward_pre_hook()


def build_parts(config: TrainConfig, groups: Groups) -> Parts:
    """Builds the model, wraps it, and gives it an optimizer and a schedule, all at step zero."""
    group_step_adam.install(config.compute.adam)
    chunks = build_model(config, groups)
    for chunk in chunks:
        if not chunk.config.calculate_per_token_loss:
            raise TrainingError(
                "the model was built with calculate_per_token_loss=False; the loss of a step is the mean "
                "over its tokens, so the model factory must set it"
            )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # step.py looks before the weights change, and says more
    )
    graph = MicroBatchGraph(groups.device) if config.compute.cuda_graphs == CudaGraphs.micro_batch else None
    with graph.on_own_stream() if graph else nullcontext():
        model = [
            DistributedDataParallel(
                chunk.config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=groups.collection
            )
            for i, chunk in enumerate(chunks)
        ]
    _connect_schedules(config, model)
    optimizer = get_megatron_optimizer(
        optimizer_config(config), model, use_gloo_process_groups=False, pg_collection=groups.collection
    )
    scheduler = build_scheduler(config, optimizer)
    return Parts(model, optimizer, scheduler, groups, config, derive(config), graph)


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    """Returns megatron's optimizer settings for this run."""
    bf16 = config.run.dtype is Dtype.bf16
    return OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        min_lr=config.optim.min_lr,  # left unset, megatron 0.16.1 fails in the first scheduler step
        weight_decay=config.optim.weight_decay,
        adam_beta1=config.optim.adam_beta1,
        adam_beta2=config.optim.adam_beta2,
        adam_eps=config.optim.adam_eps,
        clip_grad=config.optim.clip_grad_norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        log_num_zeros_in_grad=True,
    )


def build_scheduler(config: TrainConfig, optimizer: ChainedOptimizer) -> OptimizerParamScheduler:
    """Returns the schedule, in units of sequences, so that it does not depend on the batch size.

    The configuration always wins over what a checkpoint says about the schedule.
    """
    batch = config.optim.global_batch_sequences
    wsd = config.optim.schedule is LrSchedule.wsd
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optim.lr,
        min_lr=config.optim.min_lr,
        lr_warmup_steps=config.optim.warmup_steps * batch,
        lr_decay_steps=config.run.train_steps * batch,
        lr_decay_style=_DECAY_STYLE[config.optim.schedule],
        wsd_decay_steps=config.optim.decay_steps * batch if wsd else None,
        lr_wsd_decay_style="linear" if wsd else None,
        start_wd=config.optim.weight_decay,
        end_wd=config.optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def set_hyperparameters(parts: Parts, consumed_sequences: int) -> float:
    """Sets what the next optimizer step uses, and returns its learning rate.

    Learning rate, weight decay, betas and epsilon are a pure function of the configuration and of the
    sequences consumed including the step's own: the first step of a warm-up of W has lr / W, the last step
    of the run has min_lr. So nothing an optimizer brought along from a checkpoint can outlive a resume.

    Args:
        parts: what is trained.
        consumed_sequences: sequences consumed when the step is done.
    """
    optim = parts.config.optim
    for group in parts.optimizer.param_groups:
        group["max_lr"], group["min_lr"] = optim.lr, optim.min_lr
        group["betas"], group["eps"] = (optim.adam_beta1, optim.adam_beta2), optim.adam_eps
    parts.scheduler.num_steps = consumed_sequences
    parts.scheduler.step(0)
    return float(parts.optimizer.param_groups[0]["lr"])


def _connect_schedules(config: TrainConfig, model: list[DistributedDataParallel]) -> None:
    """Tells megatron's schedules how gradients are reduced; they read it from the model's config."""
    model_config = model[0].config
    model_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        model_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
