"""One start of python for each number of processes, and all layouts of that many processes in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.layout_matrix import CASES, LAYOUTS, VARIANTS

WORKER = Path(__file__).with_name("layout_worker.py")


def _launch(job, folder: Path, processes: int) -> None:
    job_file = folder / f"job{processes}.pt"
    torch.save(job, job_file)
    command = [sys.executable]
    if processes > 1:
        # --standalone lets the system choose a free port.
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(str(root / part) for part in ("", "kernels", "launch"))
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*command, str(WORKER), str(job_file), str(folder)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-20000:]


def layout_config(tiny_config, processes: int, overrides):
    return tiny_config(
        **{
            "model__num_layers": 4,
            "model__tie_embeddings": False,
            # Padded alike for one and for two tensor-parallel processes.
            "model__vocab_pad_multiple": 64,
            "optim__micro_batch_sequences": 1,
            "cluster__processes_per_node": processes,
            "data__seq_len_tokens": 64,
            "data__max_documents_per_sequence": 2,
            **overrides,
        }
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="session")
def results(folder, tiny_config):
    """Returns {layout: results of its ranks}, references included; one start for each number of processes."""
    one = [(f"one-{v}", layout_config(tiny_config, 1, o)) for v, o in VARIANTS.items()]
    one.append(("one-batched", layout_config(tiny_config, 1, {"optim__micro_batch_sequences": 2})))
    one.append(
        ("one-bf16-k1", layout_config(tiny_config, 1, VARIANTS["bf16"] | {"attention__train_topk": 1}))
    )
    one.append(("one-k1", layout_config(tiny_config, 1, {"attention__train_topk": 1})))
    jobs = {1: one, 2: [], 4: [], 8: []}
    for layout, variant in CASES:
        processes, _ = LAYOUTS[layout]
        jobs[processes].append((f"{layout}-{variant}", case_config(tiny_config, layout, variant)))
    jobs[2].append(("broken-cp2", case_config(tiny_config, "cp2", "plain")))
    jobs[4].append(("unmarked-cp4", case_config(tiny_config, "cp4_sparse", "plain")))
    for processes, job in jobs.items():
        _launch(job, folder, processes)
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(processes)]
        for processes, job in jobs.items()
        for name, _ in job
    }


def case_config(tiny_config, layout: str, variant: str):
    """Returns the settings of a case of the matrix."""
    processes, changes = LAYOUTS[layout]
    return layout_config(tiny_config, processes, {**VARIANTS[variant], **changes})
