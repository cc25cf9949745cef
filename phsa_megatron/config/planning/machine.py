"""What the plan takes a machine to be: every input with its value and source, measured or assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.planning.attention_time import table
from phsa_megatron.config.schema import TrainConfig


class Kind(StrEnum):
    """How an input came about."""

    measured = "measured"
    assumed = "assumed"
    derived = "derived"


@dataclass(frozen=True)
class Input:
    """One number that the plan rests on.

    Attributes:
        value: the number.
        unit: of it.
        kind: measured on a device, assumed, or derived from the settings.
        source: the file or the reasoning.
    """

    value: float
    unit: str
    kind: Kind
    source: str


_ROOFLINE = "kernels/benchmarks/roofline.py, one H100 80GB"
_START = "start of a collective of two; log2(n) times it for n processes"
_H100_PEAK_TFLOPS = 989.0


def _measured(value: float, unit: str, source: str = _ROOFLINE) -> Input:
    return Input(value, unit, Kind.measured, source)


def _assumed(value: float, unit: str, source: str) -> Input:
    return Input(value, unit, Kind.assumed, source)


@dataclass(frozen=True)
class Machine:
    """One GPU, its host and the network, as the plan's formulas read them."""

    gpus_per_node: int
    """GPUs of a host that NVLink connects: cluster.processes_per_node."""
    memory_gib: float
    """Memory of a GPU: cluster.memory_gib."""
    peak_tflops: float
    """Dense bf16 peak of a GPU, for utilization: cluster.peak_tflops."""
    product_tflops: Input = field(
        default_factory=lambda: _measured(798.0, "TFLOP/s", f"a bf16 product of 8192^3, {_ROOFLINE}")
    )
    """Speed of a large matrix product."""
    product_frac: Input = field(
        default_factory=lambda: _assumed(0.8, "of it", "a layer's products are smaller than that one")
    )
    """Part of `product_tflops` that a layer's products reach."""
    copy_gb_s: Input = field(default_factory=lambda: _measured(3000.0, "GB/s", f"device copy, {_ROOFLINE}"))
    """Speed of elementwise passes."""
    nvlink_gb_s: Input = field(
        default_factory=lambda: _assumed(
            350.0, "GB/s", "NVLink 4: 450 GB/s a direction; collectives reach part of it"
        )
    )
    """Bytes that a GPU sends inside its host."""
    network_gb_s: Input = field(
        default_factory=lambda: _assumed(
            40.0, "GB/s", "InfiniBand NDR: 400 Gb/s = 50 GB/s a GPU; collectives reach part of it"
        )
    )
    """Bytes that a GPU sends to another host, one adapter a GPU."""
    nvlink_latency_us: Input = field(default_factory=lambda: _assumed(15.0, "us", _START))
    """Time of a collective of two without bytes, inside a host."""
    network_latency_us: Input = field(default_factory=lambda: _assumed(30.0, "us", _START))
    """The same between hosts."""
    host_layer_ms: Input = field(
        default_factory=lambda: _assumed(
            0.6, "ms", "Python and launches of a layer's other operations, forward; twice that backward"
        )
    )
    """What a layer takes however small it is, besides its attention."""
    packed_slowdown: Input = field(
        default_factory=lambda: _assumed(
            1.75, "times cuDNN's", "flash, which takes packed documents of many lengths, at 32k and 128k"
        )
    )
    """Time of dense attention where packed documents are kept apart, against cuDNN's for as many pairs."""
    reserve_gib: Input = field(
        default_factory=lambda: _assumed(
            5.0, "GiB", "CUDA context, NCCL's buffers, fragmentation, and 80 GB cards that hold 79.6 GiB"
        )
    )
    """Memory of a GPU that the estimate leaves free."""

    @classmethod
    def of(cls, config: TrainConfig, **given: float) -> Machine:
        """Return the machine of a run's cluster, with inputs that a person gave instead of the assumed ones.

        Raises:
            ConfigError: the cluster does not say what its GPUs are.
        """
        cluster = config.cluster
        if cluster.memory_gib is None or cluster.peak_tflops is None:
            raise ConfigError(
                f"cluster.memory_gib={cluster.memory_gib}, cluster.peak_tflops={cluster.peak_tflops}: the "
                "plan needs both; choose a cluster of GPUs, as cluster=h100_8gpu, or set them"
            )
        machine = cls(cluster.processes_per_node, cluster.memory_gib, cluster.peak_tflops)
        if cluster.peak_tflops != _H100_PEAK_TFLOPS:
            speed = cluster.peak_tflops / _H100_PEAK_TFLOPS
            source = f"an H100's 798 by cluster.peak_tflops={cluster.peak_tflops:g} / 989"
            machine = replace(machine, product_tflops=_assumed(798.0 * speed, "TFLOP/s", source))
        for name, value in given.items():
            old: Input = getattr(machine, name)
            changed: Any = {name: replace(old, value=value, kind=Kind.assumed, source="given")}
            machine = replace(machine, **changed)
        return machine

    def inputs(self) -> dict[str, Input]:
        """Return all inputs by name, and the rows of the attention kernels as one of them."""
        own = {name: value for name, value in vars(self).items() if isinstance(value, Input)}
        rows = table().header
        source = f"{rows['source']}, {rows['device']}, commit {rows['commit']}"
        count = sum(len(c.ms) for c in (*table().phsa.values(), *table().dense.values()))
        return {"attention_rows": Input(count, "times", Kind.measured, source), **own}

    @property
    def usable_gib(self) -> float:
        """Return the memory that a run may take."""
        return self.memory_gib - self.reserve_gib.value

    @property
    def flop_per_s(self) -> float:
        """Return the speed of a layer's products."""
        return self.product_tflops.value * self.product_frac.value * 1e12

    def bytes_per_s(self, size: int, stride: int) -> float:
        """Return the bytes a second that one member of a group sends in a ring of all members.

        Args:
            size: members.
            stride: distance of their ranks; ranks are laid out tensor, context, data, pipeline.

        Of a group over several hosts, all members on a host take the network together: its adapters add up.
        """
        on_host = self.members_on_host(size, stride)
        if on_host == size:
            return self.nvlink_gb_s.value * 1e9
        return min(self.nvlink_gb_s.value, on_host * self.network_gb_s.value) * 1e9

    def latency_s(self, size: int, stride: int) -> float:
        """Return the time of a collective without bytes: it grows with the logarithm of the group."""
        inside = self.members_on_host(size, stride) == size
        start_us = (self.nvlink_latency_us if inside else self.network_latency_us).value
        return start_us * 1e-6 * max(1.0, math.log2(size))

    def members_on_host(self, size: int, stride: int) -> int:
        """Return how many members of a group share a host."""
        return min(size, max(1, self.gpus_per_node // stride))

    def copy_s(self, num_bytes: float) -> float:
        """Return the time of elementwise passes that move this many bytes."""
        return num_bytes / (self.copy_gb_s.value * 1e9)
