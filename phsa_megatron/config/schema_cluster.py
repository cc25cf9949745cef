"""The typed settings of a cluster: where processes start, and what Slurm is asked for.

A part of `schema.py`, under the same rules. The settings after `scheduler` belong to Slurm, except
`environment` and `python`, which every way of starting honours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class Device(StrEnum):
    """Where the model runs."""

    cpu = "cpu"
    cuda = "cuda"


class Scheduler(StrEnum):
    """Who starts the processes: torchrun on this host, or a Slurm job."""

    local = "local"
    slurm = "slurm"


@dataclass
class ClusterConfig:
    """The machine: where processes start and what one device can do."""

    name: str = MISSING
    """Name of the cluster, for people."""
    device: Device = Device.cpu
    """cpu hides any GPU from the run; cuda is refused where there is none."""
    num_nodes: int = 1
    """Hosts."""
    processes_per_node: int = 1
    """Processes on each host: one a GPU, or any number on a CPU."""
    peak_tflops: float | None = None
    """Dense bf16 peak of one device in TFLOP/s, for utilization; null leaves utilization out."""
    memory_gib: float | None = None
    """Memory of one device, for the estimate printed at start; null leaves the comparison out."""
    scheduler: Scheduler = Scheduler.local
    """local starts torchrun on this host; slurm submits a batch job."""
    python: str | None = None
    """Python that trains, as the nodes (or the container) know it; null is the one that runs phsa-launch."""
    environment: dict[str, str | None] = field(default_factory=dict)
    """Variables of the training processes; null leaves one out that a recipe sets."""
    partition: str | None = None
    """Slurm partition; null is the cluster's default."""
    account: str | None = None
    """Slurm account that pays; null is the user's default."""
    qos: str | None = None
    """Slurm quality of service; null is the default."""
    gpus_per_node: int | None = None
    """GPUs to ask for on each node; null asks for one a process with cluster.device=cuda, else for none."""
    time_limit: str | None = None
    """Longest time of one job, HH:MM:SS or D-HH:MM:SS, quoted in YAML; null is the partition's."""
    constraint: str | None = None
    """Slurm node features that are needed, such as h100; null is none."""
    stop_lead_s: int = 300
    """How long before the time limit the run is asked to save and leave. Slurm may be a minute early."""
    max_failures_without_progress: int = 3
    """Failures in a row without a newly committed step after which the job gives up."""
    requeue: bool = True
    """The job puts itself back into the queue after a stop; false where a cluster forbids it (use chain)."""
    chain: int = 1
    """Jobs to submit, each waiting for the one before it; one that finds the run done ends at once."""
    preflight: bool = True
    """Check every node before training, and leave bad ones out of the next attempt. Slurm jobs only."""
    setup_lines: list[str] = field(default_factory=list)
    """Lines of bash run on each node before Python: `module load`, `source venv/bin/activate`."""
    sbatch: dict[str, str | int | bool | None] = field(default_factory=dict)
    """Any other sbatch options without their dashes: `exclusive: true`; null or false leaves one out."""
    container_image: str | None = None
    """Image for pyxis/enroot's --container-image; null runs on the host. Needs the pyxis plugin."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts for pyxis, each HOST:CONTAINER[:FLAGS]: the run folder, the data and the code, at least."""
