"""The script for several GPUs: on CPU processes with gloo at tiny shapes, and on GPUs if there are any."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.distributed import multi_gpu, multi_gpu_page
from tests.distributed.multi_gpu_start import environments
from tests.distributed.multi_gpu_timing import cases, device_times, joined


def _run(tmp_path, *arguments):
    out = tmp_path / "multi_gpu.json"
    code = multi_gpu.main([*arguments, "--out", str(out)])
    report = json.loads(out.read_text())
    return code, report, {case["name"]: case for case in report["cases"]}


@pytest.mark.slow
def test_two_processes_on_the_cpu_pass_every_part(tmp_path):
    only = ["one_block_less-one", "cp2_sparse", "lost_marks-cp2_sparse", "tiny_sparse", "resume"]
    code, report, cases = _run(
        tmp_path, "--size", "tiny", "--processes", "2", "--seconds", "300", "--only", *only
    )
    assert code == 0 and not report["not_run"], report
    assert set(cases) == set(only)
    assert cases["resume"]["processes"] == [2, 1, 2]
    assert cases["tiny_sparse"]["sent_mib"] > 0


@pytest.mark.slow
@pytest.mark.night
def test_four_processes_on_the_cpu_equal_one(tmp_path):
    only = ["cp4_nodes_sparse", "tp2_cp2_sp", "cp2_pp2_full"]
    code, report, cases = _run(
        tmp_path, "--size", "tiny", "--processes", "4", "--seconds", "200", "--only", *only
    )
    assert code == 0 and set(cases) == set(only), report


@pytest.mark.slow
def test_a_case_that_hangs_or_fails_leaves_its_tracebacks_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_gpu, "WORKER", tmp_path / "worker.py")
    multi_gpu.WORKER.write_text(
        "import faulthandler, json, os, sys, time\n"
        "from pathlib import Path\n"
        "job, rank = json.loads(Path(sys.argv[1]).read_text()), os.environ['RANK']\n"
        "folder = Path(job['folder'])\n"
        "for case in job['cases']:\n"
        "    stack = open(folder / f\"{case['name']}.{rank}.stack\", 'w')\n"
        "    faulthandler.dump_traceback_later(0.3, file=stack)\n"
        "    if case['name'] == 'cp2':\n"
        "        def waits(): time.sleep(100)\n"
        "        waits()\n"
        "    if case['name'] == 'cp2_sparse': raise SystemExit(f'rank {rank} is out of memory')\n"
        "    faulthandler.cancel_dump_traceback_later()\n"
        "    done = folder / f\"{case['name']}.{rank}.json\"\n"
        "    done.with_suffix('.part').write_text('{\"passed\": true}')\n"
        "    done.with_suffix('.part').rename(done)\n"
    )
    monkeypatch.setattr(multi_gpu, "LAYOUT_S", 1.0)
    monkeypatch.setattr(multi_gpu, "START_S", 1.0)
    arguments = ["--size", "tiny", "--processes", "2", "--only", "cp2", "cp2_sparse", "dp2"]
    code, _, cases = _run(tmp_path, *arguments)
    assert code == 1
    assert "no result in time" in cases["cp2"]["error"] and "in waits" in cases["cp2"]["error"]
    assert "rank 1 is out of memory" in cases["cp2_sparse"]["error"]
    assert cases["dp2"] == {"name": "dp2", "kind": "layout", "passed": True}
    # A second run of one case adds to the others.
    code, report, cases = _run(tmp_path, "--size", "tiny", "--processes", "2", "--only", "dp2", "--add")
    assert set(cases) == {"cp2", "cp2_sparse", "dp2"} and len(report["cases"]) == 3


def test_processes_start_without_multicast_and_without_the_rank_of_another_run(monkeypatch):
    inherited = {
        "RANK": "5",
        "LOCAL_RANK": "5",
        "WORLD_SIZE": "9",
        "NCCL_NVLS_ENABLE": "1",
        "NCCL_DEBUG": "INFO",
    }
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    (alone,), pair = environments(1, 1234, 2), environments(2, 1234, 2)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & alone.keys()
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"]) for one in pair] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    for one in (alone, *pair):
        multicast = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
        assert [one[name] for name in multicast] == ["0", "1", "1"]
        # What a person has set stays.
        assert (one["NCCL_DEBUG"], one["CUDA_DEVICE_MAX_CONNECTIONS"]) == ("INFO", "1")


def test_exposed_time_is_what_no_other_kernel_covers():
    assert joined([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]

    def event(name, start, end, device=DeviceType.CUDA, annotation=False):
        return SimpleNamespace(
            name=name, time_range=SimpleNamespace(start=start * 1e6, end=end * 1e6), device_type=device,
            is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        event("ncclDevKernel_AllReduce", 0, 5),  # the barrier
        event("gemm", 5, 8),
        event("ncclDevKernel_AllGather", 7, 10),
        event("gemm", 9, 11),
        event("Optimizer.step", 5, 20, annotation=True),
        event("aten::mm", 0, 30, device=DeviceType.CPU),
    ]
    assert device_times(events) == {"nccl_s": 3.0, "nccl_exposed_s": 1.0, "computing_s": 5.0}


def test_the_first_case_of_a_kind_has_time_to_compile():
    timeouts = {one["name"]: one["timeout_s"] for one in cases(2, "gpu")}
    assert timeouts["0p6b_32k_cp1_phsa"] == timeouts["0p6b_32k_cp2_phsa_all_gather"] > 90
    assert timeouts["0p6b_128k_cp2_phsa_all_gather"] == timeouts["8b_128k_cp1_phsa_3layers"] == 90


def test_the_page_names_what_failed_and_what_was_not_run():
    timed = {
        "kind": "timing", "model": "8b", "seq_len": 1024, "attention": "phsa", "vocab": 8, "documents": 1,
        "exchange": "all_gather", "sent_mib": 1.0,
    }  # fmt: skip
    cases = [
        timed | {"name": f"cp{n}_{layers}", "context": n, "gpus": n, "layers": layers, "step_s": step_s,
                 "tokens_per_s": 1024 / step_s}
        for n, layers, step_s in ((1, 1, 0.2), (1, 3, 0.4), (2, 1, 0.125), (2, 3, 0.225))
    ]  # fmt: skip
    report = {
        "processes": 2, "size": "gpu", "device": "G", "torch": "2", "megatron_core": "0", "commit": "c",
        "not_run": ["late"],
        "cases": [*cases, {"name": "cp2", "kind": "layout", "passed": False, "error": "E"}],
    }  # fmt: skip
    page = multi_gpu_page.page(report)
    assert "| cp2_1 | 1 | 0.125 | 8,192 | 0.80 |" in page
    assert "| 8b_1024_phsa_2_all_gather | 50.0 | 36 | 1.88 |" in page
    assert "Failed: cp2. Not run: late." in page


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(620)
def test_all_gpus_of_this_host_pass(tmp_path):
    out = Path(os.environ.get("PHSA_MULTI_GPU_OUT", tmp_path / "multi_gpu.json"))
    assert multi_gpu.main(["--seconds", "560", "--out", str(out)]) == 0, out.read_text()
