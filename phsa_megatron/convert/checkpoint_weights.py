"""The weights of a run's checkpoint, whatever layout wrote it: one by one, and written anew."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phsa_megatron.config import compose
from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Device, Dtype, KernelImpl, TrainConfig
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.model.factory import build_model
from phsa_megatron.model.huggingface_weights import global_layer
from phsa_megatron.parallel import mcore_checkpointing as shards
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.parallel.shard_reader import ShardReader
from phsa_megatron.training import checkpoint_files as files
from phsa_megatron.training.commit import CheckpointStore
from phsa_megatron.training.replay import single_process
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.weights import bare

# Its place among the ingredients of the data order (`data/order.py`), which every trained checkpoint names.
_TOKENIZER = "data.tokenizer_file"


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model.

    Attributes:
        name: of the parameter in a GPTModel of one process.
        layer: its number in the model, from 0; -1 outside of layers.
        shape: a tensor without memory, of its shape and dtype.
    """

    name: str
    layer: int
    shape: Tensor


def settings_of(checkpoint: Path) -> TrainConfig:
    """Return the settings that a checkpoint was made under, for one process on the CPU."""
    return on_one_cpu(compose.load(checkpoint / files.CONFIG_NAME))


def on_one_cpu(config: TrainConfig, dtype: Dtype | None = None) -> TrainConfig:
    """Return the same model for one process on the CPU, in `dtype` if one is given."""
    config = single_process(config)
    return dataclasses.replace(
        config,
        run=config.run if dtype is None else dataclasses.replace(config.run, dtype=dtype),
        attention=dataclasses.replace(config.attention, impl=KernelImpl.reference),
        cluster=dataclasses.replace(config.cluster, device=Device.cpu),
    )


class StreamedWeights:
    """Reads the weights of a checkpoint one by one, in the dtype that they were trained in.

    Args:
        checkpoint: a committed checkpoint, of any layout.
        config: its settings for one process.
        groups: of this process.
    """

    def __init__(self, checkpoint: Path, config: TrainConfig, groups: Groups) -> None:
        self._reader = ShardReader(checkpoint / files.SHARDS_NAME)
        model = skeleton(config, groups)
        self._sharded = shards.model_state([model], groups)["model"]
        self.weights = [
            Weight(name, global_layer(model, name), parameter.detach())
            for name, parameter in model.named_parameters()
        ]

    def read(self, weight: Weight) -> Tensor:
        """Return its value.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        return self._reader.read(self._sharded[weight.name], weight.shape.dtype)


def skeleton(config: TrainConfig, groups: Groups) -> torch.nn.Module:
    """Return the bare model of one process without memory for its weights (on torch's meta device)."""
    meta = torch.device("meta")
    with meta:
        (model,) = build_model(config, dataclasses.replace(groups, device=meta))
    return bare(model)


def check_same_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that is not the one a checkpoint was trained with: punctuation would be elsewhere.

    Raises:
        CheckpointError: with both hashes.
    """
    trained_with = files.read_state(checkpoint).data_fingerprint.get(_TOKENIZER)
    if trained_with not in (None, tokenizer.sha256):
        raise CheckpointError(
            f"{tokenizer.path} has sha256 {tokenizer.sha256[:16]}, {checkpoint} was trained with "
            f"{str(trained_with)[:16]}: give the run's own tokenizer (--tokenizer)"
        )


def write_run(model: torch.nn.Module, config: TrainConfig, groups: Groups, tokenizer: Tokenizer) -> Path:
    """Write a run folder whose only checkpoint, of step 0, holds a model's weights; return the checkpoint.

    Args:
        model: the bare model of one process.
        config: settings of the run, for whatever layout will use it.
        groups: of this one process.
        tokenizer: of the model; the checkpoint names its hash.

    Raises:
        CheckpointError: it could not be written; what was begun is removed.
    """
    folder = RunFolder.of(config)
    store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
    partial = store.partial_path(0)
    state = TrainState(data_fingerprint={_TOKENIZER: tokenizer.sha256})
    failure = files.write(partial, state, config, groups)
    if failure is None:
        writer = shards.ShardWriter(groups)
        failure = writer.write(shards.model_state([model], groups), partial / files.SHARDS_NAME)
    if failure is not None:
        store.abandon(0)
        raise CheckpointError(f"{partial} could not be written: {failure}")
    about = files.about(config, groups) | files.layout(on_one_cpu(config)) | {files.WEIGHTS_ONLY: True}
    folder.config_file.write_text(compose.dump(config), encoding="utf-8")
    store.commit(0, shards.written_by(), about)
    return store.path(0)
