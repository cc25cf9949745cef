import contextlib
import os

import torch
import torch.distributed as dist

from phsa_megatron.parallel import collective_trace
from phsa_megatron.parallel.nccl_settings import nccl_environment, set_nccl_environment


def test_the_last_collective_has_name_number_and_shape(single_process_groups):
    collective_trace.install()
    collective_trace.install()  # a second call wraps nothing twice
    before = collective_trace.number()
    dist.all_reduce(torch.ones(3, 2))
    assert collective_trace.number() == before + 1
    assert collective_trace.last() == f"all_reduce #{before + 1} [3, 2], returned"
    assert not collective_trace.is_running()
    objects = [None]
    dist.all_gather_object(objects, "a")  # one, whatever it is made of
    assert collective_trace.number() == before + 2 and objects == ["a"]


def test_a_collective_that_fails_is_over(single_process_groups):
    collective_trace.install()
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        dist.all_reduce("no tensor")
    assert not collective_trace.is_running()
    assert collective_trace.last().startswith("all_reduce #")


def test_it_is_seen_while_it_runs(monkeypatch):
    seen = []

    def original(tensor):
        seen.append((collective_trace.is_running(), collective_trace.last()))

    collective_trace._traced("broadcast", original)(torch.ones(4))
    assert seen[0][0] and seen[0][1].startswith("broadcast #") and seen[0][1].endswith("[4], not returned")


def test_nccl_hears_what_the_person_did_not_say(monkeypatch, tmp_path):
    said = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    monkeypatch.setattr(os, "environ", said)
    set_nccl_environment(tmp_path)
    assert said["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert said["TORCH_NCCL_DUMP_ON_TIMEOUT"] == said["TORCH_NCCL_ENABLE_MONITORING"] == "1"
    assert said["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"].startswith(str(tmp_path))
    assert said.keys() == nccl_environment(tmp_path).keys()
