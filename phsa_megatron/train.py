"""The training process: `python -m phsa_megatron.train RUN/config.yaml`, once per device.

Exit codes: 0 when all steps are done, and when the run was asked to leave and is saved (RUN/done tells
which); 1 when it failed; 70 when it hung, 71 when it waited for a process that failed (docs/health.md). A
launcher reads RUN/done and RUN/committed_step, not codes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phsa_megatron.config import compose
from phsa_megatron.config.errors import PhsaError
from phsa_megatron.config.exit_codes import FAILED
from phsa_megatron.config.schema import Device, TrainConfig

COPY_GRACE_S = 60.0
"""How long a process that leaves in good order waits for its local copy of the last checkpoint."""

if TYPE_CHECKING:
    from phsa_megatron.training.progress import Progress
    from phsa_megatron.training.watchdog import Watchdog


def main(config_path: str | Path) -> int:
    """Trains the run of a resolved settings file in this process, and returns the exit code.

    A failure leaves one line of JSON (rank, host, step, phase, last collective, error) in
    RUN/logs/error_rank_#####.jsonl.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = compose.load(config_path)
    except PhsaError as error:
        print(error, file=sys.stderr)
        return FAILED
    # Torch may be imported from here on, and megatron only after the trace: the shim imports it.
    from phsa_megatron.parallel import collective_trace, cpu_shim, mcore

    collective_trace.install()
    cpu_shim.install(hide_gpu=config.cluster.device is Device.cpu)
    mcore.hide_known_notices()
    from phsa_megatron.training.progress import Progress
    from phsa_megatron.training.watchdog import Watchdog

    progress = Progress()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with Watchdog(config, progress, rank, world_size) as watchdog:
        return _train(config, progress, rank, watchdog)


def _train(config: TrainConfig, progress: Progress, rank: int, watchdog: Watchdog) -> int:
    from phsa_megatron.parallel.groups import initialize
    from phsa_megatron.training.local_copy import wait_for_copies
    from phsa_megatron.training.loop import train
    from phsa_megatron.training.resiliency import resilient
    from phsa_megatron.training.run import faults_of

    try:
        progress.faults = faults_of(config, rank)
        progress.enter("start")
        with resilient(config, progress):
            groups = initialize(config)
            outcome = train(config, groups, progress)
    except BaseException as error:
        watchdog.crashed(error)
        if not isinstance(error, PhsaError):
            raise
        print(f"rank {rank}: {error}", file=sys.stderr)
        # The other processes may hang in a collective: leave without waiting for them.
        return FAILED
    progress.enter("end")
    wait_for_copies(COPY_GRACE_S)
    groups.close()
    if groups.rank == 0:
        print(outcome.reason)
    return 0


if __name__ == "__main__":
    # The guard matters beyond style: checkpoint writers are processes that import this module again.
    if len(sys.argv) != 2:
        sys.exit("usage: python -m phsa_megatron.train RUN/config.yaml")
    sys.exit(main(sys.argv[1]))
