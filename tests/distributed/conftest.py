"""One start for each number of processes, and all layouts of that many processes in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests import forks
from tests.distributed.layout_matrix import CASES, LAYOUTS, VARIANTS


def _launch(job, folder: Path, processes: int) -> None:
    job_file = folder / f"job{processes}.pt"
    torch.save(job, job_file)
    main, files = "tests.distributed.layout_worker:main", (str(job_file), str(folder))
    ended = (
        forks.run_ranks(processes, main, *files, timeout=500) if processes > 1 else [forks.run(main, *files)]
    )
    assert all(code == 0 for code, *_ in ended), "\n".join(err[-5000:] for *_, err in ended)


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
    """Returns a folder that all test processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "layouts"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def results(request, folder, tiny_config):
    """Returns {case: results of its ranks}, references included; the first test process computes them."""
    one = [(f"one-{v}", layout_config(tiny_config, 1, o)) for v, o in VARIANTS.items()]
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
    wanted = _selected(request.session.items)
    if wanted is not None:
        jobs = {n: [(name, c) for name, c in job if name in wanted] for n, job in jobs.items()}
    with FileLock(folder / "lock"):
        if not (folder / "all").exists():
            for processes, job in jobs.items():
                if job:
                    _launch(job, folder, processes)
            (folder / "all").touch()
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(processes)]
        for processes, job in jobs.items()
        for name, _ in job
    }


def _selected(items) -> set[str] | None:
    """Returns the cases of the selected tests and their references; None: all, for a test names some."""
    names: set[str] = set()
    for item in items:
        if "results" in getattr(item, "fixturenames", ()):
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            if not {"layout", "variant"} <= parameters.keys():
                return None
            names |= {f"{parameters['layout']}-{parameters['variant']}", f"one-{parameters['variant']}"}
    return names


def case_config(tiny_config, layout: str, variant: str):
    """Returns the settings of a case of the matrix."""
    processes, changes = LAYOUTS[layout]
    return layout_config(tiny_config, processes, {**VARIANTS[variant], **changes})
