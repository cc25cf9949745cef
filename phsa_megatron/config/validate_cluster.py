"""The rules of the cluster's settings: what belongs to Slurm, and what Slurm would refuse or misread."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields

from phsa_megatron.config.rule_messages import Rule, broken
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.schema_cluster import ClusterConfig, Device, Scheduler

_SLURM_ONLY = (
    *("partition", "account", "qos", "gpus_per_node", "time_limit", "constraint", "stop_lead_s"),
    *("max_failures_without_progress", "requeue", "chain", "setup_lines", "sbatch"),
    *("container_image", "container_mounts"),
)
# Options of sbatch that have a setting of their own, or that the batch script depends on.
_TAKEN_OPTIONS = {
    "nodes": "cluster.num_nodes",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "time": "cluster.time_limit",
    "constraint": "cluster.constraint",
    "gpus-per-node": "cluster.gpus_per_node",
    "signal": "cluster.stop_lead_s",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "container-image": "cluster.container_image",
    "container-mounts": "cluster.container_mounts",
    "job-name": "run.name",
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "output", "error", "open-mode", "chdir", "array", "dependency", "wrap"),
        "",
    ),
}
# Variables that torchrun or the batch script gives each process.
_TAKEN_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PHSA_NODE_RANK", "PHSA_NUM_NODES", "PHSA_MASTER_ADDR", "PHSA_MASTER_PORT"),
)


def time_limit_s(text: str) -> int | None:
    """Return the seconds of HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, or None if it is none of them.

    Slurm's shorter forms are left out: unquoted in YAML, 24:00:00 is the number 86400, which Slurm would
    take for minutes.
    """
    match = re.fullmatch(r"(?:(\d+)-(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?)|(?:(\d+):(\d{2}):(\d{2}))", text)
    if match is None:
        return None
    days, day_hours, day_minutes, day_seconds, hours, minutes, seconds = (int(g or 0) for g in match.groups())
    total = days * 86400 + (day_hours + hours) * 3600 + (day_minutes + minutes) * 60 + day_seconds + seconds
    return total or None


def _slurm_only(config: TrainConfig) -> Iterator[str]:
    if config.cluster.scheduler is Scheduler.slurm:
        return
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(ClusterConfig)
    }
    for name in _SLURM_ONLY:
        value = getattr(config.cluster, name)
        if value != defaults[name]:
            yield broken(
                f"cluster.{name}",
                value,
                "only Slurm reads it, and cluster.scheduler is local",
                f"choose a Slurm cluster (cluster=slurm_h100), or leave cluster.{name} out",
            )


def _time_limit(config: TrainConfig) -> Iterator[str]:
    text, lead_s = config.cluster.time_limit, config.cluster.stop_lead_s
    if text is None:
        return
    limit_s = time_limit_s(text)
    if limit_s is None:
        yield broken(
            "cluster.time_limit",
            repr(text),
            "it is written HH:MM:SS or D-HH:MM:SS",
            "write '24:00:00' for a day; in YAML with the quotes, for without them it is a number",
        )
    elif limit_s <= lead_s:
        yield broken(
            "cluster.stop_lead_s",
            lead_s,
            f"the run is asked to leave that long before cluster.time_limit={text}, which is {limit_s} s",
            "ask for more time, or lower it to what a save takes",
        )


def _gpus(config: TrainConfig) -> Iterator[str]:
    cluster, gpus = config.cluster, config.cluster.gpus_per_node
    if gpus is None:
        return
    if cluster.device is Device.cpu:
        yield broken(
            "cluster.gpus_per_node",
            gpus,
            "cluster.device=cpu hides every GPU",
            "set it to null, or cluster.device=cuda",
        )
    elif gpus < cluster.processes_per_node:
        yield broken(
            "cluster.gpus_per_node",
            gpus,
            f"each of cluster.processes_per_node={cluster.processes_per_node} processes has one",
            f"ask for {cluster.processes_per_node}, or start fewer processes",
        )


def _nvtx(config: TrainConfig) -> Iterator[str]:
    if config.monitoring.nvtx and config.cluster.device is Device.cpu:
        yield broken(
            "monitoring.nvtx",
            "true",
            "NVTX ranges are of a GPU's timeline (cluster.device=cpu)",
            "set it to false (monitoring.profile names phases on any device), or cluster.device=cuda",
        )


def _sbatch_options(config: TrainConfig) -> Iterator[str]:
    for name in config.cluster.sbatch:
        key = f"cluster.sbatch.{name}"
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield broken(
                key, repr(config.cluster.sbatch[name]), "it is a long option of sbatch", "write it without --"
            )
        elif name in _TAKEN_OPTIONS:
            setting = _TAKEN_OPTIONS[name]
            yield broken(
                key,
                config.cluster.sbatch[name],
                "the batch script sets this option itself",
                f"set {setting}" if setting else "leave it out",
            )


def _one_line(config: TrainConfig) -> Iterator[str]:
    cluster = config.cluster
    texts = {
        **{name: getattr(cluster, name) for name in ("name", "partition", "account", "qos", "constraint")},
        "python": cluster.python,
        "container_image": cluster.container_image,
        **{f"sbatch.{name}": value for name, value in cluster.sbatch.items()},
        **{f"container_mounts[{i}]": mount for i, mount in enumerate(cluster.container_mounts)},
    }
    for name, text in texts.items():
        if isinstance(text, str) and (not text or any(not char.isprintable() for char in text)):
            yield broken(
                f"cluster.{name}",
                repr(text),
                "it stands on one line of the batch script",
                "use null or a text",
            )


def _environment(config: TrainConfig) -> Iterator[str]:
    for name, value in config.cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield broken(
                f"cluster.environment.{name}",
                repr(value),
                "a variable's name is letters, digits and _",
                "choose another name",
            )
        elif name in _TAKEN_VARIABLES:
            yield broken(
                f"cluster.environment.{name}",
                repr(value),
                "every process gets its own value when it starts",
                "leave it out",
            )


def _containers(config: TrainConfig) -> Iterator[str]:
    cluster = config.cluster
    if cluster.container_mounts and cluster.container_image is None:
        yield broken(
            "cluster.container_mounts",
            cluster.container_mounts,
            "there is no container to mount into",
            "set cluster.container_image, or leave the mounts out",
        )


CLUSTER_RULES: tuple[Rule, ...] = (
    _slurm_only,
    _time_limit,
    _gpus,
    _nvtx,
    _sbatch_options,
    _one_line,
    _environment,
    _containers,
)
"""All rules of this page, in the order of their messages."""
