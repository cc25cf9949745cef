"""Recorded passes against eager ones: the same to the last bit, whatever comes between the steps.

On a CPU a stand-in takes the place of CUDA's recordings: it computes when it is replayed, into the tensors of
its first replay. Whether CUDA can record the passes is a question for a GPU: the tests at the end.
"""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from phsa_megatron.attention import dense_attention
from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.topk_schedule import step_topk
from phsa_megatron.monitoring.records import read_records
from phsa_megatron.training import micro_batch_graph
from phsa_megatron.training.faults import VARIABLE, Faults
from phsa_megatron.training.micro_batch_graph import MicroBatchGraph
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.step import NonFiniteStepError, train_step
from tests.training.bench import same
from tests.training.host_recording import HostRecording, stand_in
from tests.training.processes import run_processes
from tests.training.recorded_course import course, difference, timed


@pytest.fixture
def on_host(monkeypatch):
    """Gives a bench the stand-in."""
    stand_in(monkeypatch.setattr)
    monkeypatch.setattr(HostRecording, "made", [])

    def recorded(bench):
        bench.parts.graph = MicroBatchGraph(torch.device("cpu"))
        return bench

    return recorded


SMALL = {"optim.micro_batch_sequences": 1, "compute.loss": "chunked"}
ANNEAL = {
    "attention.topk_schedule": "anneal",
    "attention.topk_start": 4,
    "attention.topk_anneal_steps": 3,
}


def test_replayed_steps_equal_those_of_megatrons_schedule(bench, on_host):
    eager = bench(**SMALL)
    assert len({int(b.loss_mask.sum()) for b in eager.batches()}) > 1
    expected = [eager.step() for _ in range(4)]
    recorded = on_host(bench(**SMALL))
    assert [recorded.step() for _ in range(4)] == expected
    assert same(recorded.snapshot(), eager.snapshot())
    assert len(HostRecording.made) == 2, "one micro-batch warms up, and the passes are recorded once"


@pytest.mark.parametrize("stale", ["tokens", "own_tokens", "labels", "loss_mask", "cu_seqlens"])
def test_an_input_that_is_not_renewed_shows(bench, on_host, monkeypatch, stale):
    """The control: what a recording was made with must not be what it goes on computing with."""
    eager = bench(**SMALL)
    expected = [eager.step() for _ in range(2)]
    names = tuple(name for name in micro_batch_graph._COPIED if name != stale)
    monkeypatch.setattr(micro_batch_graph, "_COPIED", names)
    recorded = on_host(bench(**SMALL))
    assert [recorded.step() for _ in range(2)] != expected


def test_a_step_that_is_watched_is_eager_and_the_next_one_is_recorded_anew(bench, on_host):
    def steps(made):
        found = [made.step()]
        logits = MaxLogitRecorder(2, torch.device("cpu"), 32)
        found.append(
            train_step(made.parts, made.batches(), made.table, made.state, Progress(), logits=logits)
        )
        assert float(logits.maxima.max()) > 0
        return [*found, made.step()]

    eager = bench(**SMALL)
    expected = steps(eager)
    recorded = on_host(bench(**SMALL))
    assert steps(recorded) == expected
    assert same(recorded.snapshot(), eager.snapshot())
    first, second = HostRecording.made[:2], HostRecording.made[2:]
    assert len(second) == 2 and all(r.released for r in first) and not any(r.released for r in second)


def test_another_k_is_another_recording(bench, on_host):
    eager = bench(**SMALL, **ANNEAL)
    expected = [eager.step() for _ in range(4)]
    recorded = on_host(bench(**SMALL, **ANNEAL))
    assert [recorded.step() for _ in range(4)] == expected
    choices = {step_topk(eager.config, step).topk for step in range(1, 5)}
    assert len(choices) > 2 and len(HostRecording.made) == 2 * len(choices)


def test_other_settings_are_another_recording(bench, on_host):
    """Who measures several attentions on one model changes its settings between the steps."""
    made = on_host(bench(**SMALL))
    made.step()
    made.parts.config = made.config = replace(made.config)
    made.step()
    assert len(HostRecording.made) == 4 and all(r.released for r in HostRecording.made[:2])


def test_a_fault_stops_the_step_and_no_bit_changes(bench, on_host, monkeypatch):
    made = on_host(bench(**SMALL))
    made.step()
    before = made.snapshot()
    monkeypatch.setenv(VARIABLE, "nan_loss@step=2")
    with pytest.raises(NonFiniteStepError):
        made.step(Faults.from_environment(rank=0))
    assert same(made.snapshot(), before)


def test_phases_are_told_of_replayed_passes_too(bench, on_host):
    made = on_host(bench(**SMALL))
    made.step()
    heard: list[str] = []
    progress = Progress()
    progress.on_enter.append(heard.append)
    train_step(made.parts, made.batches(), made.table, made.state, progress)
    assert heard == ["forward", "backward"] * 4 + ["optimizer"]


def test_the_course_of_the_gpus_tests_finds_no_difference_here_and_one_that_is_made(bench, on_host):
    """What those tests run and compare, where it can be seen to work; and its control."""
    eager = course(bench(**SMALL), lambda name: nullcontext())
    made = on_host(bench(**SMALL))
    recorded = course(made, lambda name: nullcontext())
    assert difference(eager, recorded) is None
    assert len(HostRecording.made) == 6
    name, gradient = next(iter(recorded[1].gradients.items()))
    gradient.view(-1)[0] += 1e-3
    assert difference(eager, recorded).startswith("step 2: backward pass, gradients of 1 of ")
    assert name in difference(eager, recorded)
    recorded[0].rows[0][0][0] += 1e-3
    assert difference(eager, recorded).startswith("step 1: forward pass")


class FakeCuda:
    """A recording that ends like CUDA's: an error inside of it is followed by one of its end."""

    def __init__(self, graph, **settings):
        assert settings["capture_error_mode"] == "thread_local"

    def __enter__(self):
        self.collected = gc.isenabled()

    def __exit__(self, kind, error, trace):
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", FakeCuda)
    assert gc.isenabled()


def test_nothing_is_collected_while_a_pass_is_recorded(fake_cuda):
    """A closed communicator that the collector finds would end, on this thread, in the middle of it."""
    seen = []
    micro_batch_graph.Recording(lambda: seen.append(gc.isenabled()), None, None)
    assert seen == [False] and gc.isenabled()
    with pytest.raises(RuntimeError):
        micro_batch_graph.Recording(lambda: 1 // 0, None, None)
    assert gc.isenabled()


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_an_error_says_which_pass_was_recorded_and_what_was_first(fake_cuda, broken):
    with pytest.raises(RuntimeError) as raised, micro_batch_graph._named(broken):
        micro_batch_graph.Recording(lambda: 1 // 0, None, None)
    assert f"while the {broken} pass of a micro-batch was recorded" in raised.value.__notes__[0]
    assert isinstance(raised.value.__context__, ZeroDivisionError)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
def test_the_exchange_of_keys_is_recorded_too(tiny_config, sharding):
    """Two context-parallel processes, several micro-batches: curve and bytes are those of eager passes."""
    found = []
    for name in ("eager", "recorded"):
        settings = {
            "run.name": name,
            "parallel.context_size": 2,
            "parallel.context_sharding": sharding,
            "parallel.context_exchange": "all_gather",
            "cluster.processes_per_node": 2,
            "monitoring.log_every_steps": 1,
        }
        config = tiny_config(**SMALL, **settings)
        call = "phsa_megatron.train:main" if name == "eager" else "tests.training.host_recording:main"
        ended = run_processes(config, [0, 1], call=call)
        assert ended.codes == [0, 0], ended.everything()
        assert ("recorded on the host" in ended.everything()) == (name == "recorded")
        records = read_records(RunFolder.of(config).metrics_file).values_by_step.values()
        keys = ("train/loss_nats", "optim/grad_norm", "perf/context_sent_bytes_per_layer")
        found.append([[step[key] for key in keys] for step in records if keys[0] in step])
    assert len(found[0]) == config.run.train_steps and found[0][0][2] > 0
    assert found[0] == found[1]


ON_GPU = {
    "run.dtype": "bf16",
    "model.hidden_size": 128,
    "model.head_dim": 64,
    "attention.impl": "triton",
    "attention.block_tokens": 16,
    "attention.init_tokens": 16,
    "attention.local_tokens": 32,
    "data.seq_len_tokens": 512,
    "optim.micro_batch_sequences": 1,
    "evaluate.micro_batch_sequences": 1,  # other shapes would be compiled: one case below pays for that
    "compute.loss": "chunked",
    "compute.elementwise": "compiled",
    "compute.norm": "triton",
    "cluster.device": "cuda",
}
DENSE = {"attention.kind": "dense", "data.isolate_documents": False}
# From the least that can fail to the most; the first compiles only the loss. Under `-x` the first failure
# says how far recording works.
CASES = {
    "no_kernels_of_ours": DENSE | {"compute.elementwise": "unfused", "compute.norm": "torch"},
    "phsa": {},
    # More than 3,072 tokens: the embedding's backward pass sorts. The last chunk of the loss is shorter.
    "several_rows": {
        "optim.micro_batch_sequences": 8,
        "optim.global_batch_sequences": 16,
        "compute.loss_chunk_tokens": 1536,
    },
    "distributed_optimizer": {"parallel.distributed_optimizer": True},
    # Every k compiles kernels anew: two are enough.
    "another_k": ANNEAL | {"attention.topk_start": 2, "attention.topk_anneal_steps": 2},
    "dense": DENSE,
}


@pytest.fixture
def say(capsys):
    """Says something at once: who waits for a GPU has to see whether it compiles or hangs."""

    def aloud(text):
        with capsys.disabled():
            print(f"  {text}", flush=True)

    return aloud


# The method is part of the bound: a signal's handler does not run while C++ waits for the device. This one
# prints where every thread is and ends the process.
@pytest.mark.gpu
@pytest.mark.timeout(150, method="thread")
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_on_a_gpu_equal_eager_ones_to_the_last_bit(bench, monkeypatch, say, case):
    made = []
    actual = micro_batch_graph.Recording.__init__

    def counted(self, *arguments):
        actual(self, *arguments)
        made.append(self)

    monkeypatch.setattr(micro_batch_graph.Recording, "__init__", counted)
    if case == "no_kernels_of_ours":
        # Sums of no chosen order in flash's and cuDNN's backward passes would not be the recording's fault.
        monkeypatch.setattr(dense_attention, "_FASTEST_FIRST", [dense_attention.SDPBackend.MATH])

    def stages(graphs):
        # Forgotten, so that both begin alike: where shapes have changed the compiler takes kernels of any
        # size, which sum in another order. From its cache on disk, compiling again takes little time.
        torch._dynamo.reset()
        with timed(f"{case}, cuda_graphs={graphs}: build", say):
            opened = bench(**ON_GPU | CASES[case], **{"compute.cuda_graphs": graphs})
        return course(opened, lambda name: timed(f"{case}, cuda_graphs={graphs}: {name}", say))

    eager = stages("none")
    assert not made
    recorded = stages("micro_batch")
    assert len(made) >= 6, "three times both passes"
    found = difference(eager, recorded)
    if found is not None:
        again = difference(eager, stages("none"))
        repeats = "repeat to the last bit" if again is None else f"do not repeat themselves ({again})"
        pytest.fail(f"replayed differs from eager in {found}\nEager steps {repeats}.")


@pytest.mark.gpu
@pytest.mark.timeout(150, method="thread")
def test_a_run_on_a_gpu_is_the_same_to_the_last_bit(tiny_config, run, say):
    """With what only a run has: a thread that reads ahead, clocks, the watchdog, a checkpoint."""
    often = {"run.train_steps": 5, "evaluate.every_steps": 3, "monitoring.max_logit_every_steps": 4}
    torch._dynamo.reset()
    with timed("a run, cuda_graphs=none", say):
        eager = run(tiny_config(**ON_GPU | often, **{"run.name": "eager"}))
    graphs = {"run.name": "recorded", "compute.cuda_graphs": "micro_batch"}
    torch._dynamo.reset()
    with timed("a run, cuda_graphs=micro_batch", say):
        recorded = run(tiny_config(**ON_GPU | often, **graphs))
    assert recorded.curve() == eager.curve()
    assert len([step for step in eager.steps if "val/loss_nats" in step]) >= 2

    def losses(finished):
        return [{k: v for k, v in step.items() if "loss" in k or "logit" in k} for step in finished.steps]

    assert losses(recorded) == losses(eager)
