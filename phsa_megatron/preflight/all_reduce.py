"""A short all-reduce: do collectives work between the nodes, and how long does one take?

On a CPU cluster the preflight's own process takes part for its node, over gloo. With GPUs one worker process
a GPU does (NCCL), first among the GPUs of the node, then over all nodes: a node whose own all-reduce fails is
bad, and a worker that hangs can be killed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from phsa_megatron.config.schema import Device, TrainConfig
from phsa_megatron.preflight.checks import Check, Status, judged
from phsa_megatron.preflight.nodes import Nodes

_GPU_BYTES = 64 << 20
_CPU_BYTES = 4 << 20
_ROUNDS = 3
_ANSWER = "PREFLIGHT "
NAMES = ("all-reduce in the node", "all-reduce over all")


@dataclass(frozen=True)
class Group:
    """One all-reduce to be tried: who takes part, and where they meet."""

    name: str
    rank: int
    size: int
    address: str
    port: int


def check_all_reduce(config: TrainConfig, nodes: Nodes) -> list[Check]:
    """Try it and judge the time; all nodes call it together."""
    place, health = nodes.place, config.health
    timeout_s = health.preflight_timeout_s
    if config.cluster.device is Device.cpu:
        in_node = Check(NAMES[0], Status.not_applicable, "cluster.device=cpu")
        if place.num_nodes == 1:
            return [in_node, Check(NAMES[1], Status.not_applicable, "one node")]
        group = Group("nodes", place.node_rank, place.num_nodes, place.address, place.port)
        try:
            seconds = timed_all_reduce(group, "cpu", timeout_s)
        except (dist.DistError, RuntimeError) as error:
            return [in_node, Check(NAMES[1], Status.unknown, f"it failed: {error}")]
        return [in_node, _judged(NAMES[1], seconds, health.max_all_reduce_s, place.num_nodes)]
    count = config.cluster.processes_per_node
    return _by_workers(nodes, count, "cuda", timeout_s, health.max_all_reduce_s)


def _judged(name: str, seconds: float, limit_s: float, size: int, *, own: bool = False) -> Check:
    """A slow all-reduce of one node is that node's fault; of all nodes it cannot be told whose."""
    rule = f"at most health.max_all_reduce_s={limit_s:g} s"
    found = f"{seconds * 1e3:.1f} ms for {size} processes"
    if own:
        return judged(name, seconds <= limit_s, found, rule)
    return Check(name, Status.ok if seconds <= limit_s else Status.unknown, found, rule)


def _by_workers(nodes: Nodes, count: int, device: str, timeout_s: float, limit_s: float) -> list[Check]:
    """Let one process a device try both groups, and name what failed."""
    place = nodes.place
    answers, failure = run_workers(nodes, count, device, timeout_s)
    in_node = [answer["in_node_s"] for answer in answers.values() if "in_node_s" in answer]
    over_all = [answer["over_all_s"] for answer in answers.values() if "over_all_s" in answer]
    rule = "every GPU of the node takes part"
    if len(in_node) < count:
        first = Check(NAMES[0], Status.bad, failure or "a worker failed", rule)
        return [first, Check(NAMES[1], Status.unknown, "not reached")]
    first = _judged(NAMES[0], max(in_node), limit_s, count, own=True)
    if len(over_all) < count:
        return [first, Check(NAMES[1], Status.unknown, failure or "a worker failed")]
    return [first, _judged(NAMES[1], max(over_all), limit_s, count * place.num_nodes)]


def run_workers(
    nodes: Nodes, count: int, device: str, timeout_s: float
) -> tuple[dict[int, dict[str, float]], str]:
    """Start this node's workers; return their answers by local rank, and what the first failure said."""
    place = nodes.place
    shared = {
        "device": device,
        "count": count,
        "node_rank": place.node_rank,
        "num_nodes": place.num_nodes,
        "address": place.address,
        "port": nodes.port,
        "timeout_s": timeout_s,
    }
    answers: dict[int, dict[str, float]] = {}
    failure = ""
    give_up_at_s = time.monotonic() + 3 * timeout_s  # torch's start, and a timeout in each of the two groups
    with ExitStack() as stack:
        # Into files: a worker that fills a pipe nobody reads would wait for ever.
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(shared | {"local": local})],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for local, log in enumerate(logs)
        ]
        for local, (worker, log) in enumerate(zip(workers, logs, strict=True)):
            try:
                worker.wait(timeout=max(0.1, give_up_at_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
                failure = failure or f"local rank {local} did not end in time"
            log.seek(0)
            lines = log.read().splitlines()
            found = [json.loads(line.removeprefix(_ANSWER)) for line in lines if line.startswith(_ANSWER)]
            answers[local] = {key: value for answer in found for key, value in answer.items()}
            if worker.returncode != 0:
                last = (lines or ["it said nothing"])[-1]
                failure = failure or f"local rank {local} ended with code {worker.returncode}: {last}"
    return answers, failure


def timed_all_reduce(group: Group, device: str, timeout_s: float) -> float:
    """Seconds that one all-reduce takes, the median of a few after a first one."""
    timeout = timedelta(seconds=timeout_s)
    server = TCPStore(group.address, group.port, is_master=False, wait_for_workers=False, timeout=timeout)
    on_gpu = device != "cpu"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore(f"all_reduce/{group.name}", server),
        rank=group.rank,
        world_size=group.size,
        timeout=timeout,
    )
    try:
        num_bytes = _GPU_BYTES if on_gpu else _CPU_BYTES
        tensor = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
        times_s = []
        for _ in range(1 + _ROUNDS):
            tensor.fill_(1.0)
            began_s = time.perf_counter()
            dist.all_reduce(tensor)
            if on_gpu:
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - began_s)
        if not bool((tensor == group.size).all()):
            raise RuntimeError(f"the sum of {group.size} ones came out as {tensor[0].item()}")
        return statistics.median(times_s[1:])
    finally:
        dist.destroy_process_group()


def _work(arguments: dict[str, Any]) -> None:
    """What one worker does: its node's all-reduce, then the one over all."""
    local, count, node_rank = arguments["local"], arguments["count"], arguments["node_rank"]
    device = arguments["device"]
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    where = {"address": arguments["address"], "port": arguments["port"]}
    own = Group(f"node_{node_rank}", local, count, **where)
    everyone = Group("all", node_rank * count + local, count * arguments["num_nodes"], **where)
    for key, group in (("in_node_s", own), ("over_all_s", everyone)):
        seconds = timed_all_reduce(group, device, arguments["timeout_s"])
        print(_ANSWER + json.dumps({key: seconds}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    _work(json.loads(sys.argv[1]))
