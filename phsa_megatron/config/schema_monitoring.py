"""The settings of `monitoring`: what is measured, where it is written, and when somebody is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class WandbMode(StrEnum):
    """Where W&B writes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.offline
    """offline writes into the run folder and prints the sync command; online uploads; disabled is off."""
    project: str = "phsa-megatron"
    """Project name."""
    entity: str | None = None
    """Team or user; null is the account's default."""


@dataclass
class AlertsConfig:
    """When somebody is told: a line on the console, a file in RUN/alerts, an event, a W&B alert."""

    enabled: bool = True
    """false raises no alert; a step that is not finite still stops the run."""
    loss_spike_nats: float = 0.3
    """Smallest rise of a step's loss over the median of the last 100 steps that is a spike."""
    loss_spike_sigmas: float = 6.0
    """A spike must also rise by so many robust standard deviations of those 100 losses."""
    throughput_drop_frac: float = 0.3
    """Loss of speed against the median of the last 50 records."""
    straggler_ratio: float = 1.5
    """A process's own time (its data and forward passes) over the median of its pipeline stage."""
    patience_records: int = 3
    """Records in a row that must be slow before a drop or a straggler is told."""
    stall_frac: float = 0.5
    """Share of the time that `health` allows a phase without progress, after which a stall is told."""


@dataclass
class ProfileConfig:
    """A trace of some steps, in RUN/profile: what `phsa-train profile` sets."""

    first_step: int = 0
    """Number of the first step that is traced; 0 traces none."""
    num_steps: int = 3
    """Steps in the trace."""
    memory: bool = True
    """On a GPU, also a snapshot of the allocator's history over those steps."""


@dataclass
class MonitoringConfig:
    """What is measured and where it is written."""

    log_every_steps: int = 1
    """Steps between metric records."""
    information_every_steps: int = 0
    """Steps between measurements of the attention mass that selection loses, in training; 0 never."""
    information_rows: int = 32
    """Queries that one such measurement looks at, per layer and micro-batch."""
    max_logit_every_steps: int = 100
    """Steps between measurements of the largest attention logit, in training; 0 never."""
    max_logit_rows: int = 32
    """Queries that one such measurement looks at, per layer and micro-batch."""
    norms_every_steps: int = 100
    """Steps between records of gradient and weight norms by block of the model; 0 never."""
    progress: bool = True
    """Progress bar on a terminal; without a terminal, plain lines."""
    report: bool = True
    """Write report.html when the run ends or stops."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into RUN/tensorboard; needs the package tensorboard."""
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    """When somebody is told."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A trace of some steps."""
    nvtx: bool = False
    """Mark phases of the step as NVTX ranges, for Nsight Systems; they are in a profile's trace anyway."""
