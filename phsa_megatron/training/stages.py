"""The start of a new stage: another run's weights, or those of a Hugging Face folder, and nothing else.

Optimizer, schedule, counters and data order begin anew, so sequence length, mixture and attention may change:
attention has no parameters, so that dense to PHSA and back is free, and a selector that has some starts with
fresh ones where the source has none. RUN/lineage.json says where they came from.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from phsa_megatron.config import compose, lineage, resume_rules
from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.model import selector_weights
from phsa_megatron.model.huggingface_weights import fill_from_huggingface
from phsa_megatron.training import agreement
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.checkpoint_files import CONFIG_NAME
from phsa_megatron.training.commit import CheckpointStore
from phsa_megatron.training.optimizer import Parts


def init_from(config: TrainConfig, parts: Parts, checkpointer: Checkpointer) -> lineage.Source:
    """Fill the model with the weights that `run.init_from` names, and record where they came from.

    From a run these are the model's weights of its newest committed checkpoint, in the dtype they were
    trained in; the optimizer's fp32 copies start from them. All processes call it.

    Args:
        config: settings of the new run.
        parts: its freshly built parts, filled in place.
        checkpointer: its checkpointer.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: the source cannot be trusted or read.
        ConfigError: it is no source, or its weights have another shape.
    """
    if config.run.init_from is None:
        raise ValueError("init_from needs run.init_from")
    source = lineage.describe_source(config.run.init_from)
    if source.kind == "huggingface":
        fill_from_huggingface(source.path, config, parts.modules, parts.groups.collection.tp.rank())
        with torch.no_grad():
            parts.optimizer.reload_model_params()
    else:
        source = _load_run(source, config, parts, checkpointer)
    if parts.groups.rank == 0:
        lineage.write_lineage(RunFolder.of(config).lineage_file, source)
    return source


def _load_run(
    source: lineage.Source, config: TrainConfig, parts: Parts, checkpointer: Checkpointer
) -> lineage.Source:
    folder = RunFolder(source.path)
    store = CheckpointStore(folder.checkpoints_dir, folder.committed_step)
    # Process 0 chooses: the source may still be training, and another process might see a newer one.
    step = agreement.decide(parts.groups, lambda: store.newest().newest)
    if step is None:
        raise CheckpointError(f"run.init_from={source.path}: this run has no committed checkpoint")
    checkpoint = store.path(step)
    settings = checkpoint / CONFIG_NAME
    parent = compose.load(settings)
    resume_rules.check_new_stage(parent, config)
    fresh = selector_weights.start_fresh(parent, config)
    checkpointer.load_from(checkpoint, parts, weights_only=True, fresh_selector=fresh)
    return dataclasses.replace(
        source,
        step=step,
        config_file=settings,
        config_sha256=hashlib.sha256(settings.read_bytes()).hexdigest(),
    )
