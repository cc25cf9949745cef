"""Under context parallelism, every selector without weights gives the output and gradients of one process."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from phsa_megatron.config.schema import Selector
from phsa_megatron.config.selector_kinds import WITH_PARAMETERS


def test_every_selector_on_two_processes_equals_one(tmp_path):
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join(str(root / part) for part in ("", "kernels", "launch"))
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("selector_worker.py")
    done = subprocess.run(
        [*command, str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        assert set(results) == {selector.value for selector in set(Selector) - WITH_PARAMETERS}
        for selector, differences in results.items():
            assert differences.pop("control") > 0.1
            # fp64: sums of at most 128 terms in another order.
            assert all(value < 1e-12 for value in differences.values()), (selector, differences)
