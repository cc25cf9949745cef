"""Processes of a run: start, groups, seeds, and the few collectives that other rooms need.

Nobody outside this room reads megatron's process-group globals.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import ContextSharding, Device, TrainConfig
from phsa_megatron.parallel import cpu_shim, mcore, sequence_sharding
from phsa_megatron.parallel.meeting import meet
from phsa_megatron.parallel.nccl_settings import set_nccl_environment

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Above what the run's watchdog allows, which knows phases and says more: torch's timeout is the net below it.
_ABOVE_WATCHDOG_S = 120.0


@dataclass(frozen=True)
class Groups:
    """The place of this process among all processes of the run."""

    rank: int
    """Index among all processes."""
    world_size: int
    """Number of processes."""
    data_rank: int
    """Which share of the batch this process reads."""
    data_size: int
    """Into how many shares a batch is divided."""
    is_first_stage: bool
    """Whether this process holds the input embedding."""
    is_last_stage: bool
    """Whether this process computes the loss."""
    device: torch.device
    """Where its tensors live."""
    collection: ProcessGroupCollection
    """megatron's process groups; `hcp` holds ours, inside a node and across nodes (see `ContextGroups`)."""
    context_sharding: ContextSharding = ContextSharding.zigzag
    """Which parts of a sequence a context-parallel process holds."""

    @property
    def context_rank(self) -> int:
        """Return which part of every sequence this process holds."""
        return int(self.collection.cp.rank())

    @property
    def context_size(self) -> int:
        """Return into how many parts a sequence is divided."""
        return int(self.collection.cp.size())

    def own_part(self, rows: Tensor) -> Tensor:
        """Return [b, S / CP]: what this process holds of `rows` [b, S], on any device."""
        return sequence_sharding.own_part(rows, self.context_size, self.context_rank, self.context_sharding)

    def any_true(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process. Every process must call it."""
        votes = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes that share this process's part of the model.

        They differ in data rank, or in the part of the sequences that they hold: what is the same for a whole
        sequence must be counted at one context rank only.
        """
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.collection.dp_cp)
        return total

    def sum_over_world(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all processes."""
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def max_over_world(self, tensor: Tensor) -> Tensor:
        """Return the largest of `tensor`, element by element, over all processes."""
        largest = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def gather(self, tensor: Tensor) -> Tensor:
        """Return `tensor` of every process, [world_size, ...], on the CPU."""
        mine = tensor.detach().to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).cpu()

    def sum_over_context(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the processes that hold parts of the same sequences."""
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.collection.cp)
        return total

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Return the last pipeline stage's `tensor` on all stages, which pass one of its shape and dtype."""
        result = tensor.detach().to(self.device, copy=True)
        pipeline = self.collection.pp
        last = dist.get_process_group_ranks(pipeline)[-1]
        dist.broadcast(result, src=last, group=pipeline)
        return result

    def barrier(self) -> None:
        """Wait until every process is here."""
        # An all-reduce instead of dist.barrier: NCCL's barrier guesses the device.
        self.any_true(False)

    def close(self) -> None:
        """Leave all groups. The process can initialize again afterwards."""
        from megatron.core import parallel_state

        mcore.forget_mtp_losses()
        mcore.forget_expert_losses()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def initialize(config: TrainConfig) -> Groups:
    """Start the processes of a run and return this one's groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun and phsa-launch set them;
    without RANK the run is this one process. Seeds every random generator and asks torch for deterministic
    operations.

    Raises:
        ConfigError: the number of processes does not fit the recipe's layout; checked before any connection.
        DeviceError: the device or a process of the run is missing, or megatron-core is an unsupported
            version.
    """
    mcore.installed_version()
    mcore.hide_known_notices()
    rank, world_size = _read_rank()
    _check_world_size(config, world_size)
    device = _choose_device(config)
    if config.run.num_threads > 0:
        torch.set_num_threads(config.run.num_threads)
    _ask_for_determinism(device)
    _connect(config, rank, world_size, device)
    _build_model_parallel(config)
    _seed(config.run.seed)
    return _describe(config, rank, world_size, device)


def _read_rank() -> tuple[int, int]:
    if "RANK" not in os.environ:
        return 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise DeviceError(
            f"RANK={os.environ['RANK']} is set but {', '.join(missing)} is not: start processes with "
            "torchrun or phsa-launch, or unset RANK to run one process"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _check_world_size(config: TrainConfig, world_size: int) -> None:
    """Refuse a number of processes that the recipe did not ask for or that its layout cannot use."""
    cluster, layout = config.cluster, config.parallel
    expected = cluster.num_nodes * cluster.processes_per_node
    if world_size != expected:
        raise ConfigError(
            f"cluster.num_nodes={cluster.num_nodes} x "
            f"cluster.processes_per_node={cluster.processes_per_node} is {expected} processes, but "
            f"{world_size} started. Start {expected} (torchrun --nproc-per-node "
            f"{cluster.processes_per_node}, or phsa-launch), or change the recipe"
        )
    model_size = layout.tensor_size * layout.pipeline_size * layout.context_size
    if world_size % model_size:
        raise ConfigError(
            f"parallel.tensor_size={layout.tensor_size} x parallel.pipeline_size={layout.pipeline_size} x "
            f"parallel.context_size={layout.context_size} is {model_size} processes for one copy of the "
            f"model; {world_size} processes do not divide into such copies. Use a multiple of {model_size}"
        )


def _choose_device(config: TrainConfig) -> torch.device:
    if config.cluster.device == Device.cpu:
        if not cpu_shim.is_installed():
            raise DeviceError(
                "cluster.device=cpu, but this process sees a GPU and megatron-core would use it: set "
                "CUDA_VISIBLE_DEVICES= (empty), or use cluster.device=cuda"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "cluster.device=cuda, but torch sees no CUDA device: use cluster.device=cpu, or install a CUDA "
            "build of torch and a driver (phsa-train doctor says what is missing)"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"LOCAL_RANK={local_rank}, but this host shows {torch.cuda.device_count()} GPUs: "
            f"cluster.processes_per_node={config.cluster.processes_per_node} must not exceed them"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _ask_for_determinism(device: torch.device) -> None:
    """Same seed, same layout, same machine: same bits. On CUDA an operation that cannot promise it warns."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Filling every new tensor with NaN finds bugs, but costs a pass over memory each time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def longest_wait_s(config: TrainConfig) -> float:
    """Return how long a collective may take before torch itself ends the process."""
    health = config.health
    longest = max(
        health.first_step_timeout_s, health.step_timeout_s, health.data_timeout_s, health.long_phase_timeout_s
    )
    return longest + _ABOVE_WATCHDOG_S


def _connect(config: TrainConfig, rank: int, world_size: int, device: torch.device) -> None:
    if world_size == 1:
        # One process needs neither a port nor a file to find itself.
        store: Store = HashStore()
    else:
        store = meet(rank, world_size, config.cluster.processes_per_node, config.health.start_timeout_s)
    if device.type == "cuda":
        set_nccl_environment(RunFolder.of(config).logs_dir)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=longest_wait_s(config)),
        device_id=device if device.type == "cuda" else None,
    )


def _build_model_parallel(config: TrainConfig) -> None:
    from megatron.core import parallel_state

    layout = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_size,
        context_parallel_size=layout.context_size,
        expert_model_parallel_size=layout.expert_size,
        # An expert is whole in one process; without experts megatron's default makes the same groups.
        expert_tensor_parallel_size=1 if config.model.num_experts else None,
        distributed_timeout_minutes=math.ceil(longest_wait_s(config) / 60),
    )


def _seed(seed: int) -> None:
    """Seed python, numpy, torch and megatron's tracker, alike in every process.

    Weights are drawn on the CPU at full size and then cut, so that the tensor-parallel size does not change
    them.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _context_levels(config: TrainConfig) -> list[dist.ProcessGroup]:
    """Return this process's context groups inside its node and across nodes, or nothing if all are alike.

    megatron's own hierarchical groups are made by its function only if einops is installed.
    """
    from megatron.core import parallel_state

    node_size = config.parallel.context_node_size
    if node_size is None:
        return []
    mine = dist.get_process_group_ranks(parallel_state.get_context_parallel_group())
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    found: dict[str, dist.ProcessGroup] = {}
    # Every process takes part in the making of every group, in one order.
    for ranks in sorted(map(list, {tuple(ranks) for ranks in everyone})):
        nodes = [ranks[start : start + node_size] for start in range(0, len(ranks), node_size)]
        levels = {"inside": nodes, "across": [list(place) for place in zip(*nodes, strict=True)]}
        for level, members in levels.items():
            for group_ranks in members:
                group = dist.new_group(group_ranks, timeout=timedelta(seconds=longest_wait_s(config)))
                if dist.get_rank() in group_ranks:
                    found[level] = group
    return [found["inside"], found["across"]]


def _describe(config: TrainConfig, rank: int, world_size: int, device: torch.device) -> Groups:
    from megatron.core.process_groups_config import ProcessGroupCollection

    collection: Any = ProcessGroupCollection.use_mpu_process_groups()
    collection.hcp = _context_levels(config)
    pipeline_rank, pipeline_size = collection.pp.rank(), collection.pp.size()
    return Groups(
        rank=rank,
        world_size=world_size,
        data_rank=collection.dp.rank(),
        data_size=collection.dp.size(),
        is_first_stage=pipeline_rank == 0,
        is_last_stage=pipeline_rank == pipeline_size - 1,
        device=device,
        collection=collection,
        context_sharding=config.parallel.context_sharding,
    )
