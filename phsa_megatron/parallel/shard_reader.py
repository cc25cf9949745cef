"""Reads single tensors, or parts of them, out of the files that megatron's dist_checkpointing writes.

megatron's own load wants all parts of a tensor that belong to a process in one call, and it stacks a weight
of all layers into one tensor. The files are those of torch's distributed checkpoint, which can be read box by
box; no process group is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from phsa_megatron.config.errors import CheckpointError


class ShardReader:
    """The tensors of one checkpoint.

    Args:
        folder: megatron's files.

    Raises:
        CheckpointError: the folder has no readable list of tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = FileSystemReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # a pickle that is cut off raises anything
            raise CheckpointError(f"{folder} has no readable list of tensors: {error!r}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, entry: ShardedTensor | ShardedTensorFactory, dtype: torch.dtype) -> Tensor:
        """Return the part of the checkpoint that an entry of a sharded state dict stands for.

        Args:
            entry: its data is not used, and may be on the meta device.
            dtype: of the result; what is saved is converted.

        Raises:
            CheckpointError: the checkpoint does not hold it, in this shape.
        """
        if isinstance(entry, ShardedTensorFactory):  # gate and up projection: two parts of one tensor
            parts = list(nested_values(entry.build()))
            return torch.cat([self.read(part, dtype) for part in parts])
        stacked = (1,) * entry.prepend_axis_num
        value = torch.empty(stacked + tuple(entry.local_shape), dtype=dtype)
        self._fill(entry.key, tuple(entry.global_offset), value)
        return value.view(entry.local_shape)

    def _fill(self, key: str, offset: tuple[int, ...], value: Tensor) -> None:
        saved = self._metadata.state_dict_metadata.get(key)
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{self._folder} holds no tensor {key}: it is another model's checkpoint")
        ends = [start + size for start, size in zip(offset, value.shape, strict=True)]
        if len(saved.size) != len(ends) or any(e > s for e, s in zip(ends, saved.size, strict=True)):
            raise CheckpointError(
                f"{self._folder}: {key} has shape {tuple(saved.size)}, which has no part of shape "
                f"{tuple(value.shape)} at {offset}: it is another model's checkpoint"
            )
        box = ChunkStorageMetadata(torch.Size(offset), value.shape)
        items = create_read_items_for_chunk_list(key, saved, [box])
        if sum(item.lengths.numel() for item in items) != value.numel():
            raise CheckpointError(f"{self._folder}: parts of {key} were never written")
        plan = self._reader.prepare_local_plan(LoadPlan(items))
        try:
            self._reader.read_data(plan, _Into(value)).wait()
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(f"{self._folder}: {key} cannot be read: {error!r}") from error


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._value
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError("only tensors are asked for")

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        raise NotImplementedError("the plan is given")

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is given")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError("the plan is given")

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError("the plan is given")
