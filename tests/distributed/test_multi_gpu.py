"""The script for several GPUs: on CPU processes with gloo at tiny shapes, and on GPUs if there are any."""

import itertools
import json
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from tests.distributed import multi_gpu, multi_gpu_groups, multi_gpu_page, multi_gpu_timing
from tests.distributed.layout_matrix import LAYOUTS
from tests.distributed.multi_gpu_layouts import BESIDE, SIZES, layout_config
from tests.distributed.multi_gpu_layouts import cases as layout_names
from tests.distributed.multi_gpu_start import environments
from tests.distributed.multi_gpu_timing import cases, compiled_shapes, device_times, joined


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
def test_controls_fail_at_the_gpus_shapes(tmp_path):
    """Which blocks a process needs of others follows from shapes: at some, nobody needs what is lost."""
    only = ["cp2_sparse", "lost_pooled_keys-cp2", "lost_marks-cp2_sparse"]
    arguments = ["--size", "gpu_shapes", "--processes", "2", "--seconds", "300", "--only", *only]
    code, report, cases = _run(tmp_path, *arguments)
    assert code == 0 and set(cases) == set(only), report
    # Far out of bounds: not by what rounds otherwise on a GPU.
    for name in only[1:]:
        assert cases[name]["worst_distance"] > 1.5 * cases[name]["worst_bound"], cases[name]
        assert cases[name]["mean_distance"] > 3 * cases[name]["mean_of_one"], cases[name]


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
    arguments = [
        "--size",
        "tiny",
        "--processes",
        "2",
        "--commit",
        "first",
        "--only",
        "cp2",
        "cp2_sparse",
        "dp2",
    ]
    code, _, cases = _run(tmp_path, *arguments)
    assert code == 1
    assert "no result in time" in cases["cp2"]["error"] and "in waits" in cases["cp2"]["error"]
    assert "rank 1 is out of memory" in cases["cp2_sparse"]["error"]
    assert cases["dp2"] == {"name": "dp2", "kind": "layout", "commit": "first", "passed": True}
    # A case that is named is run again, and its row has its own commit; the others stay.
    again = ["--size", "tiny", "--processes", "2", "--only", "dp2", "--add", "--commit", "second"]
    code, report, cases = _run(tmp_path, *again)
    commits = {name: row["commit"] for name, row in cases.items()}
    assert commits == {"cp2": "first", "cp2_sparse": "first", "dp2": "second"} and len(report["cases"]) == 3
    page = (tmp_path / "multi_gpu.md").read_text()
    assert "commits first, second" in page and "| dp2 @ second |" in page.replace("failed", "")


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
    assert timeouts["0p6b_128k_cp1_phsa"] == timeouts["0p6b_128k_cp2_phsa_all_gather"] > 90
    assert timeouts["0p6b_32k_cp2_phsa_all_gather"] == timeouts["8b_128k_cp1_phsa_3layers"] == 90


def test_adding_takes_what_is_not_there_or_has_failed_and_what_is_named(tmp_path):
    earlier = tmp_path / "multi_gpu.json"
    rows = [
        {"name": "cp2", "passed": True},
        {"name": "cp2_sparse", "passed": False},
        {"name": "0p6b_32k_cp1_phsa", "step_s": 0.6},  # a time has passed if it was taken
        {"name": "0p6b_128k_cp1_phsa", "error": "E"},
        {"name": "tp2", "passed": True, "again": True},
    ]
    earlier.write_text(json.dumps({"cases": rows}))
    names = [row["name"] for row in rows] + ["dp2"]
    cases = [{"name": name} for name in names]

    def left(*arguments):
        return [case["name"] for case in multi_gpu.to_run(cases, *arguments)]

    assert left(None, earlier) == ["cp2_sparse", "0p6b_128k_cp1_phsa", "tp2", "dp2"]
    assert left(["cp2", "dp2"], earlier) == ["cp2", "dp2"]
    assert left(None, None) == left(None, tmp_path / "nothing.json") == names


def test_adding_refuses_results_of_another_machine(tmp_path):
    out = tmp_path / "multi_gpu.json"
    arguments = multi_gpu.parser().parse_args(["--size", "tiny", "--processes", "2", "--out", str(out)])
    session = multi_gpu.Session(arguments, tmp_path)
    session.save()
    arguments.add, arguments.commit = True, "later"
    assert multi_gpu.Session(arguments, tmp_path).report["commit"] == "later"
    session.report["device"] = "another"
    session.save()
    with pytest.raises(SystemExit, match="differs in .'device'"):
        multi_gpu.Session(arguments, tmp_path)


def test_layouts_with_the_same_groups_follow_one_another_and_make_them_once(monkeypatch):
    @dataclass
    class Fake:
        context_sharding: object = None

        def barrier(self):
            events.append("barrier")

        def close(self):
            events.append("close")

    def initialize(config):
        events.append((config.cluster.processes_per_node, os.environ.get("RANK")))
        return Fake()

    events: list[object] = []
    monkeypatch.setattr(multi_gpu_groups, "initialize", initialize)
    kept, size = multi_gpu_groups.KeptGroups(), SIZES["tiny"]
    names = [name.split("-")[-1] for name in layout_names(2)]
    for rank, expected in (("0", [(1, None)]), ("1", [])):
        monkeypatch.setenv("RANK", rank)
        events.clear()
        for name in names:
            count, changes = (1, {}) if name == "one" else (LAYOUTS | BESIDE)[name]
            with kept.of(layout_config(size, count, changes)) as groups:
                assert (groups is None) == (name == "one" and rank == "1")
                sharding = "contiguous" if "contiguous" in name else "zigzag"
                assert groups is None or groups.context_sharding.value == sharding
            assert os.environ["RANK"] == rank
        kept.close()
        starts = [event for event in events if isinstance(event, tuple)]
        # Context, tensor, pipeline, virtual stages, data; process 0 has been alone before.
        assert starts == [*expected, *[(2, rank)] * 5]
        assert events.count("close") == events.count("barrier") == len(starts)


def test_times_change_groups_and_compiled_shapes_seldom():
    found = cases(2, "gpu")
    places = [key for key, _ in itertools.groupby(case["context"] for case in found)]
    assert places == [1, 2, 1, 2]
    # 0.6B and 8B at 128k, alone and in halves; 8B at 512k; dense attention and documents; 0.6B at 32k.
    shapes = [key for key, _ in itertools.groupby(map(compiled_shapes, found))]
    assert len(found) == 26 and len(shapes) == 10
    assert compiled_shapes(found[0]) != compiled_shapes(found[3]), "half of the tokens is another shape"


def test_no_model_stays_when_a_case_is_over(monkeypatch, tmp_path):
    """Or the next one's peak memory would have it in it."""
    models, build = [], multi_gpu_timing.build_parts

    def remembered(*arguments):
        parts = build(*arguments)
        models.append(weakref.ref(parts.modules[0]))
        return parts

    monkeypatch.setattr(multi_gpu_timing, "build_parts", remembered)
    monkeypatch.delenv("RANK", raising=False)
    kept = multi_gpu_groups.KeptGroups()
    row = multi_gpu_timing.run_case(cases(1, "tiny")[0], 1, kept, quiet=tmp_path)
    kept.close()
    assert row["step_s"] > 0 and [model() for model in models] == [None]


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
        "cases": [
            *cases,
            {"name": "cp2", "kind": "layout", "passed": False, "error": "E", "note": "N.", "again": True},
        ],
    }  # fmt: skip
    page = multi_gpu_page.page(report)
    assert "| cp2_1 | 1 | 0.125 | 8,192 | 0.80 |" in page
    assert "| 8b_1024_phsa_2_all_gather | 50.0 | 36 | 1.88 |" in page
    assert "Failed: cp2. Not run: late. To be run again: cp2." in page
    assert "- cp2: N." in page and "commit c." in page


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.timeout(620)
def test_all_gpus_of_this_host_pass(tmp_path):
    out = Path(os.environ.get("PHSA_MULTI_GPU_OUT", tmp_path / "multi_gpu.json"))
    assert multi_gpu.main(["--seconds", "560", "--out", str(out)]) == 0, out.read_text()
