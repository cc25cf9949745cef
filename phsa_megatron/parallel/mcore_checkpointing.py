"""Sharded tensors to and from a folder, through megatron's dist_checkpointing 0.16.1 to 0.19.2.

The one place that knows which of its arguments exist in which version. Folders, markers and what belongs
into a checkpoint are decided in the training room.
"""

from __future__ import annotations

import inspect
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.parallel.checkpoint_worker import STOP_SIGNALS, outlive_stop_signals
from phsa_megatron.parallel.groups import Groups

# Optimizer state by parameter, independent of how many processes hold it: the only layout that a run with
# other tensor-, pipeline-, context- and data-parallel sizes can read.
_OPTIMIZER_SHARDING = "fully_reshardable"

# What dist_checkpointing raises for a checkpoint that does not fit. CheckpointException is a BaseException.
_LOAD_ERRORS = (
    CheckpointingException,
    CheckpointException,
    KeyError,
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
)

_result_manager: SyncManager | None = None


def written_by() -> dict[str, str]:
    """Versions that a checkpoint records."""
    return {"megatron_core": version("megatron-core"), "torch": str(torch.__version__)}


def check_readable(made_with: dict[str, str], source: Path) -> None:
    """Refuse a checkpoint of a newer megatron-core: its format goes forward only.

    Raises:
        CheckpointError: it names both versions and the fix.
    """
    theirs, ours = made_with.get("megatron_core", "0"), version("megatron-core")
    if _major_minor(theirs) > _major_minor(ours):
        raise CheckpointError(
            f"{source} was written with megatron-core {theirs}, but {ours} is installed here: older versions "
            f"cannot read newer checkpoints. Install megatron-core {theirs} or newer (up to 0.20)."
        )


def _major_minor(text: str) -> tuple[int, int]:
    major, minor = (text.split(".") + ["0"])[:2]
    return int(major), int(minor)


def chunk_names(chunks: Sequence[Any]) -> list[str]:
    """Names of a process's model chunks in a checkpoint."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def model_state(chunks: Sequence[Any], groups: Groups) -> ShardedStateDict:
    """Sharded weights of this process's model chunks, without wrappers around them."""
    metadata = _metadata(groups)
    pairs = zip(chunk_names(chunks), chunks, strict=True)
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in pairs}


def optimizer_state(optimizer: Any, weights: ShardedStateDict, groups: Groups, *, loading: bool) -> Any:
    """Sharded optimizer state that belongs to these weights.

    Args:
        optimizer: megatron's optimizer.
        weights: what `model_state` returned.
        groups: process groups.
        loading: whether the tensors are to be filled; then missing optimizer state is made first.
    """
    metadata = {
        **_metadata(groups),
        "distrib_optim_sharding_type": _OPTIMIZER_SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    if not loading:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            # Before the first step there are no moments yet, and megatron fails on their absence.
            if not part.is_stub_optimizer and not part.optimizer.state:
                part.init_state_fn(part.optimizer, part.config)
    # An fp32 model's distributed optimizer copies into views of the parameters themselves.
    with torch.no_grad():
        return optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)


def load_optimizer(optimizer: Any, state: Any) -> None:
    """Fill an optimizer with what `read` returned for it.

    The learning-rate bounds of this run win over the saved ones: 0.19.2 recognizes parameter groups by them,
    so that a changed `optim.lr` would make it fail on a KeyError.
    """
    state = _regrouped(optimizer, state)
    bounds = {
        name: optimizer.param_groups[0][name]
        for name in ("max_lr", "min_lr")
        if name in optimizer.param_groups[0]
    }
    for group in _saved_groups(state):
        group.update(bounds)
    with torch.no_grad():
        optimizer.load_state_dict(state)


def _regrouped(optimizer: Any, state: Any) -> Any:
    """Return a distributed optimizer's loaded state in the form of this process's optimizers.

    Experts have an optimizer of their own only while several processes share them. What `read` returned holds
    tensors in the form of this process, under the number of each optimizer if there are several, and all else
    in the form of the process that saved. What is not a tensor is the same for both optimizers.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if not isinstance(state, dict):
        return state
    numbered = [state[key] for key in sorted(key for key in state if isinstance(key, int))]
    plain = {key: value for key, value in state.items() if not isinstance(key, int)}
    if not numbered or not plain:
        return state
    saved, here = (plain, numbered) if len(parts) > 1 else (numbered[0], [plain])
    groups = _saved_groups(state)
    # Groups are recognized by what they are for; the last of equals counts.
    flipped = [{**group, "is_expert_parallel": not group.get("is_expert_parallel")} for group in groups]
    common = {
        **{key: value for key, value in saved.items() if key != "param_state"},
        "optimizer": {**saved["optimizer"], "param_groups": flipped + groups},
    }
    arranged = [{**common, "param_state": part["param_state"]} for part in here]
    return dict(enumerate(arranged)) if len(parts) > 1 else arranged[0]


def _saved_groups(state: Any) -> list[dict[str, Any]]:
    """All parameter groups in an optimizer's state, which is a dict, or one of several optimizers'."""
    if not isinstance(state, dict | list):
        return []
    if isinstance(state, dict) and "param_groups" in state:
        return list(state["param_groups"])
    parts = state.values() if isinstance(state, dict) else state
    return [group for part in parts for group in _saved_groups(part)]


def _metadata(groups: Groups) -> dict[str, Any]:
    return {"dp_cp_group": groups.collection.dp_cp, "singleton_local_shards": False}


def local_num_bytes(state: ShardedStateDict) -> int:
    """Bytes of tensors that this process will write: each shard is written by one process."""
    total = 0
    for item in nested_values(state):
        data = getattr(item, "data", None)
        if isinstance(data, torch.Tensor) and is_main_replica(item.replica_id):
            total += data.nbytes
    return total


class ShardWriter:
    """Writes sharded state into folders, in the foreground or in a forked process.

    All processes call the same methods in the same order. A failure that all processes learn of is returned
    as a text; anything else is raised, and ends the process that met it.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._queue = AsyncCallsQueue()

    def write(self, state: ShardedStateDict, folder: Path) -> str | None:
        """Write now; returns None, or what went wrong on which process."""
        request, failure = self._prepare(state, folder)
        if request is None:
            return failure
        arguments = list(request.async_fn_args)
        mine = ""
        try:
            if request.preload_fn is not None:
                arguments[1] = request.preload_fn()
            if request.async_fn is not None:
                request.async_fn(*arguments, **request.async_fn_kwargs)
        except Exception as error:
            # megatron would leave the other processes in its next barrier for ever.
            mine = repr(error)
        if self._groups.any_true(bool(mine)):
            return mine or "another process could not write its shards (see its log)"

        def finalize() -> None:
            for step in request.finalize_fns:
                step()

        return self._failure_of(finalize)

    def start(self, state: ShardedStateDict, folder: Path) -> str | None:
        """Copy what is to be written and start a process that writes it; returns None, or what went wrong."""
        request, failure = self._prepare(state, folder)
        if request is not None:
            failure = self._failure_of(lambda: self._queue.schedule_async_request(request))
        return failure

    def finish(self, *, wait: bool) -> tuple[bool, str | None]:
        """Finish a write in the background if all processes are done.

        Args:
            wait: stay until they are.

        Returns:
            Whether it is finished, and if it failed, why.
        """
        finished: list[int] = []
        failure = self._failure_of(
            lambda: finished.extend(self._queue.maybe_finalize_async_calls(blocking=wait))
        )
        return bool(finished) or failure is not None, failure

    def _prepare(self, state: ShardedStateDict, folder: Path) -> tuple[Any, str | None]:
        """Plan what each process writes; 0.16.1 also writes a small file here. The request, or a failure."""
        _prepare_results()
        newer = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            # The default there needs nvidia-resiliency-ext.
            newer["async_strategy"] = "mcore"
        requests: list[Any] = []

        def plan() -> None:
            # The asynchronous form in both cases: with it, a failing write can be agreed on.
            requests.append(dist_checkpointing.save(state, str(folder), async_sharded_save=True, **newer))

        failure = self._failure_of(plan)
        return (requests[0] if requests else None), failure

    def _failure_of(self, call: Callable[[], Any]) -> str | None:
        """None, or the failure that megatron raised on all processes together."""
        try:
            call()
        except CheckpointException as error:
            texts = [f"process {rank}: {failure[0]}" for rank, failure in error.failures.items()]
            return "; ".join(texts) or "another process could not write its shards (see its log)"
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            # Only this process knows, while the others wait in a collective: it can only be left.
            if self._groups.world_size > 1:
                raise CheckpointError(
                    f"process {self._groups.rank} cannot go on saving: {error!r}"
                ) from error
            return repr(error)
        return None


def _prepare_results() -> None:
    """Give megatron's writers a fresh queue for their results, in a process that outlives stop signals."""
    global _result_manager
    if _result_manager is None:
        _result_manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        # A signal that comes while it starts must not end it either: it inherits what is blocked here.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            _result_manager.start(initializer=outlive_stop_signals)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # A fresh one each time: a result that a failed save left behind would pass for the next save's.
    filesystem_async._results_queue = _result_manager.Queue()


def read(state: ShardedStateDict, folder: Path) -> dict[str, Any]:
    """Fill sharded state from a folder and return it in the form that `load_state_dict` takes.

    Raises:
        CheckpointError: the folder does not hold this state.
    """
    try:
        with torch.no_grad():
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    except _LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(
            f"{folder} cannot be read into this model: {type(error).__name__}: {reason}"
        ) from error
    return loaded
