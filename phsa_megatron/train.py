"""The training process: `python -m phsa_megatron.train RUN/config.yaml`, once per device.

Exit codes: 0 when all steps are done, and when the run was asked to leave and is saved (RUN/done tells
which); 1 when it failed. A launcher reads RUN/done and RUN/committed_step, not codes.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path

from phsa_megatron.config import compose
from phsa_megatron.config.errors import PhsaError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Device, TrainConfig


def main(config_path: str | Path) -> int:
    """Trains the run of a resolved settings file in this process, and returns the exit code.

    A failure leaves one line of JSON (rank, host, step, phase, error) in RUN/logs/error_rank_#####.jsonl.
    """
    try:
        config = compose.load(config_path)
    except PhsaError as error:
        print(error, file=sys.stderr)
        return 1
    # Torch may be imported from here on, and megatron only after the shim.
    from phsa_megatron.parallel import cpu_shim, mcore

    cpu_shim.install(hide_gpu=config.cluster.device is Device.cpu)
    mcore.hide_known_notices()
    from phsa_megatron.parallel.groups import initialize
    from phsa_megatron.training.loop import train
    from phsa_megatron.training.run import Progress

    progress = Progress()
    groups = None
    try:
        groups = initialize(config)
        outcome = train(config, groups, progress)
    except BaseException as error:
        _record_failure(config, progress.step, progress.phase, error)
        if not isinstance(error, PhsaError):
            raise
        print(f"rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        # The other processes may hang in a collective: leave without waiting for them.
        return 1
    groups.close()
    if groups.rank == 0:
        print(outcome.reason)
    return 0


def _record_failure(config: TrainConfig, step: int, phase: str, error: BaseException) -> None:
    rank = int(os.environ.get("RANK", "0"))
    record = {
        "time": time.time(),
        "rank": rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": step,
        "phase": phase,
        "error": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exception(error),
    }
    folder = RunFolder.of(config).logs_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"error_rank_{rank:05d}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as failure:
        print(f"the failure of rank {rank} could not be recorded in {folder}: {failure}", file=sys.stderr)


if __name__ == "__main__":
    # The guard matters beyond style: checkpoint writers are processes that import this module again.
    if len(sys.argv) != 2:
        sys.exit("usage: python -m phsa_megatron.train RUN/config.yaml")
    sys.exit(main(sys.argv[1]))
