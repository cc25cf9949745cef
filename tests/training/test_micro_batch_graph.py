"""Recorded passes against eager ones: the same to the last bit, whatever comes between the steps.

On a CPU a stand-in takes the place of CUDA's recordings: it computes when it is replayed, into the tensors of
its first replay. Whether CUDA can record the passes is a question for a GPU: the tests at the end.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
    "run.train_steps": 8,
    "model.hidden_size": 128,
    "model.head_dim": 64,
    "attention.impl": "triton",
    "attention.block_tokens": 16,
    "attention.init_tokens": 16,
    "attention.local_tokens": 32,
    "data.seq_len_tokens": 512,
    "optim.micro_batch_sequences": 1,
    "compute.loss": "chunked",
    "compute.elementwise": "compiled",
    "compute.norm": "triton",
    "cluster.device": "cuda",
    "evaluate.every_steps": 3,
    "monitoring.max_logit_every_steps": 4,
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim.micro_batch_sequences": 2},
        {"parallel.distributed_optimizer": True},
        ANNEAL,
        {"attention.kind": "dense", "data.isolate_documents": False},
    ],
)
def test_a_run_on_a_gpu_is_the_same_to_the_last_bit(tiny_config, run, monkeypatch, settings):
    """Evaluation and a look at logits come between the steps, and memory is recorded anew after them."""
    made: list[micro_batch_graph.Recording] = []
    actual = micro_batch_graph.Recording.__init__

    def counted(self, *arguments):
        made.append(self)
        actual(self, *arguments)

    monkeypatch.setattr(micro_batch_graph.Recording, "__init__", counted)
    eager = run(tiny_config(**ON_GPU | settings, **{"run.name": "eager"}))
    assert not made
    graphs = {"run.name": "recorded", "compute.cuda_graphs": "micro_batch"}
    recorded = run(tiny_config(**ON_GPU | settings, **graphs))
    assert len(made) >= 4
    assert recorded.curve() == eager.curve()
    validation = [step for step in eager.steps if "val/loss_nats" in step]
    assert len(validation) >= 2

    def losses(finished):
        return [{k: v for k, v in step.items() if "loss" in k or "logit" in k} for step in finished.steps]

    assert losses(recorded) == losses(eager)
