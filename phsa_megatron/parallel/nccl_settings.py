"""What NCCL's own watchdog in torch is told, for runs on GPUs, unless the person has said something else."""

from __future__ import annotations

import os
from pathlib import Path


def nccl_environment(logs_dir: Path) -> dict[str, str]:
    """Variables for torch's NCCL process groups, each with its reason.

    The run's watchdog knows what a phase may take and ends a hung process first; torch's watchdog is the net
    below it, for a process whose Python cannot run any more.

    Args:
        logs_dir: RUN/logs; traces of a timeout go there.
    """
    trace = str(logs_dir / "nccl_trace_rank_")
    return {
        # An error or timeout ends the process without waiting for NCCL's clean-up, which can hang itself.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        # The thread that looks after torch's watchdog, which a CUDA call that never returns stops as well.
        "TORCH_NCCL_ENABLE_MONITORING": "1",
        # Not about collectives, whose timeout is the process group's; a first CUDA call may take minutes.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600",
        # The last collectives of every process, written when one times out. Newer versions of torch call
        # the buffer and the file FR.
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": trace,
        "TORCH_FR_DUMP_TEMP_FILE": trace,
    }


def set_nccl_environment(logs_dir: Path) -> None:
    """Set the variables that are not set; before the first NCCL group."""
    for name, value in nccl_environment(logs_dir).items():
        os.environ.setdefault(name, value)
