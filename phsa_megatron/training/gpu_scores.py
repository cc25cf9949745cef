"""nvidia-resiliency-ext's scores of GPUs: how fast each runs the kernels that all run, and it ran before.

The run's own straggler alert sees a process whose data and forward passes take longer than its neighbours'.
This one sees a GPU that is slow in every kernel, whoever waits for it, by CUPTI's times of single kernels.
"""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from phsa_megatron.config.errors import DeviceError
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.monitoring.alerts import Alert

_MODULES = ("nvidia_resiliency_ext.attribution.straggler", "nvidia_resiliency_ext.straggler")
"""Newer versions have moved it."""
_STEPS_TIMED = 10
"""Steps between two looks whose kernels are timed; timing every step would slow it down."""


class GpuScores:
    """An open detector, or none where `health.gpu_scores_every_steps` is 0.

    Args:
        config: of the run.
        detector: the package's `Detector`, initialized; None for none.
        tell: leaves an alert.
    """

    def __init__(self, config: TrainConfig, detector: Any, tell: Callable[[Alert], None]) -> None:
        self._every = config.health.gpu_scores_every_steps
        self._threshold = 1 / config.monitoring.alerts.straggler_ratio
        self._detector, self._tell = detector, tell

    def step(self) -> AbstractContextManager[None]:
        """Return the block that a training step runs in."""
        if self._detector is None:
            return nullcontext()
        section: AbstractContextManager[None] = self._detector.detection_section("step", profile_cuda=True)
        return section

    def after_step(self, step: int) -> None:
        """Scores all GPUs if it is time, and tells of slow ones. Collective, and waits for the device."""
        if self._detector is None or step % self._every != 0:
            return
        report = self._detector.generate_report()
        if report is None:
            return
        found = report.identify_stragglers(
            gpu_rel_threshold=self._threshold, gpu_indiv_threshold=self._threshold
        )
        kinds = {
            "the speed of the fastest": ("straggler_gpus_relative", report.gpu_relative_perf_scores),
            "its own best speed": ("straggler_gpus_individual", report.gpu_individual_perf_scores),
        }
        for speed, (key, scores) in kinds.items():
            for slow in sorted(found[key], key=lambda straggler: straggler.rank):
                score = scores[slow.rank]
                text = (
                    f"the GPU of rank {slow.rank} on {slow.node} runs its kernels at {score:.0%} of {speed}"
                )
                fields = {"straggler_rank": slow.rank, "node": slow.node, "score": score, "by": "nvrx"}
                self._tell(Alert("straggler", step, text, fields))


@contextmanager
def gpu_scores(config: TrainConfig, tell: Callable[[Alert], None]) -> Iterator[GpuScores]:
    """Opens the detector if it is asked for.

    Args:
        config: of the run; `health.gpu_scores_every_steps` asks.
        tell: leaves an alert; called on process 0 alone, which has the scores.

    Raises:
        DeviceError: it is asked for, and the package or CUPTI is not there.
    """
    every = config.health.gpu_scores_every_steps
    if every == 0:
        yield GpuScores(config, None, tell)
        return
    detector = _detector()
    try:
        detector.initialize(
            scores_to_compute=["relative_perf_scores", "individual_perf_scores"],
            gather_on_rank0=True,
            profiling_interval=max(1, every // _STEPS_TIMED),
            node_name=socket.gethostname(),
        )
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"health.gpu_scores_every_steps={every}: nvidia-resiliency-ext cannot time kernels here "
            f"({error}); set it to 0"
        ) from error
    try:
        yield GpuScores(config, detector, tell)
    finally:
        detector.shutdown()


def _detector() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name).Detector
        except ImportError as error:
            failure = error
    raise DeviceError(
        f"health.gpu_scores_every_steps: nvidia-resiliency-ext cannot be imported ({failure}); "
        "pip install 'phsa-megatron[resiliency]', or set it to 0"
    )
