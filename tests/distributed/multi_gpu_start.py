"""What the processes of `multi_gpu.py` and of its runs start with."""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
_OTHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def served_store() -> TCPStore:
    """Return a store on a free port, as torchrun's agent has one: to be kept while its processes live.

    One of process 0 would end between two cases' groups, and its port could be taken before it is up.
    """
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environments(processes: int, port: int, threads: int) -> list[dict[str, str]]:
    """Return the environment of every process; one by itself gets no rank, as a run of one process has none.

    NVLink multicast stays off: on a host that others share, a program that fails in it may take their GPUs
    out of service. As in `recipes/cluster/slurm_h100.yaml` kernels are queued in one line, as tensor
    parallelism asks for, and NCCL says why it fails; both only if nobody has said otherwise.

    Args:
        processes: how many there are.
        port: of the store on this host.
        threads: of the CPU, for each process.
    """
    path = os.pathsep.join(
        [*(str(ROOT / part) for part in (".", "kernels", "launch")), os.environ.get("PYTHONPATH", "")]
    )
    shared = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN"}
    shared |= {name: value for name, value in os.environ.items() if name not in _OTHERS}
    shared |= {
        "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    if processes == 1:
        return [shared]
    ranks = map(str, range(processes))
    return [shared | {"RANK": r, "LOCAL_RANK": r, "WORLD_SIZE": str(processes)} for r in ranks]


def cpu_threads(processes: int, on_gpus: bool) -> int:
    """Return the CPU threads of a process: fresh weights of a GPU's model are drawn on the CPU."""
    return max(1, min(8, (os.cpu_count() or 1) // (2 * processes))) if on_gpus else 1
