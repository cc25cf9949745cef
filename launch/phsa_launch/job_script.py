"""Renders the batch script of a run: the one place that knows what Slurm is asked for."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jinja2

from phsa_megatron.config.environment import process_environment
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Device, TrainConfig

TEMPLATE = "job.sbatch.j2"
# What Slurm and bash read alike, unquoted, in every place where a path stands. Slurm expands % in --output.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./+:@,=-]*")


def render(config: TrainConfig, working_dir: Path) -> str:
    """Return the batch script of a run.

    Args:
        config: checked settings with cluster.scheduler=slurm.
        working_dir: folder that relative paths of the settings start from; the job runs there.

    Raises:
        ConfigError: a path holds characters that Slurm would read differently.
    """
    folder = RunFolder((working_dir / RunFolder.of(config).path).resolve())
    for path in (folder.path, working_dir):
        if not _PLAIN_PATH.fullmatch(str(path)):
            raise ConfigError(
                f"{path}: Slurm reads blanks, quotes and % in a path its own way, so no job can work there; "
                "set run.root_dir to, and start from, folders named with letters, digits and ._+:@,=- only"
            )
    cluster = config.cluster
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["sbatch"] = _sbatch_value
    source = (resources.files("phsa_launch") / "templates" / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        run_name=config.run.name,
        num_nodes=cluster.num_nodes,
        processes_per_node=cluster.processes_per_node,
        script=folder.job_script,
        run_dir=folder.path,
        options=list(_options(config, folder, working_dir)),
        python=cluster.python or sys.executable,
        max_failures=cluster.max_failures_without_progress,
        may_requeue=int(cluster.requeue),
        setup_lines=[line for text in cluster.setup_lines for line in text.splitlines()],
        environment=process_environment(config),
        preflight=cluster.preflight,
        container_image=cluster.container_image,
        container_mounts=cluster.container_mounts,
    )


def job_name(folder: RunFolder) -> str:
    """Return the name under which Slurm lets one job of this run folder run at a time."""
    path = str(folder.path.resolve())
    return f"{folder.path.name}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def job_log(folder: RunFolder, job_id: str) -> Path:
    """Return the console of a job: the batch script's own lines, torchrun's, and rank 0's."""
    return folder.path / f"slurm-{job_id}.log"


def _options(
    config: TrainConfig, folder: RunFolder, working_dir: Path
) -> Iterator[tuple[str, str | int | bool]]:
    cluster = config.cluster
    yield "job-name", job_name(folder)
    # Two jobs of one run never run at the same time, whoever submits them.
    yield "dependency", "singleton"
    yield "nodes", cluster.num_nodes
    yield "ntasks-per-node", 1
    gpus = cluster.gpus_per_node
    if cluster.device is Device.cuda:
        yield "gpus-per-node", gpus or cluster.processes_per_node
    for option in ("partition", "account", "qos", "constraint"):
        value = getattr(cluster, option)
        if value is not None:
            yield option, value
    if cluster.time_limit is not None:
        yield "time", cluster.time_limit
    yield "signal", f"B:USR1@{cluster.stop_lead_s}"
    yield ("requeue" if cluster.requeue else "no-requeue"), True
    yield "chdir", str(working_dir)
    yield "output", str(folder.path / "slurm-%j.log")
    yield "open-mode", "append"
    for option, value in cluster.sbatch.items():
        if value is not None and value is not False:
            yield option, value


def _sbatch_value(value: object) -> str:
    """Return a value as an #SBATCH line takes it: quoted where Slurm would end it at a blank or a #."""
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./+:@,=%&|()\[\]*-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
