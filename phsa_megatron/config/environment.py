"""Environment variables that a training process must have before torch is imported."""

from __future__ import annotations

from phsa_megatron.config.schema import Device, TrainConfig


def process_environment(config: TrainConfig) -> dict[str, str]:
    """Return the variables that a run's settings ask for.

    `cluster.device=cpu` hides every GPU; `run.num_threads` must reach OpenMP before it starts its threads;
    `cluster.environment` comes last.
    """
    variables = {}
    if config.cluster.device == Device.cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if config.run.num_threads > 0:
        variables["OMP_NUM_THREADS"] = str(config.run.num_threads)
    variables.update({name: value for name, value in config.cluster.environment.items() if value is not None})
    return variables
