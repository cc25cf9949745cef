"""Schedules of k, selectors and information metrics in real runs: exact under resume, nothing else moves."""

import json

import pytest

from phsa_megatron.config.schema import Selector, TopkSchedule
from phsa_megatron.monitoring.records import read_records
from phsa_megatron.training.faults import VARIABLE

SCHEDULES = {
    "dense_first": {"attention.topk_dense_steps": 3},
    "anneal": {
        "attention.topk_schedule": TopkSchedule.anneal,
        "attention.topk_start": 6,
        "attention.topk_anneal_steps": 4,
    },
    "random_step": {
        "attention.topk_schedule": TopkSchedule.random_step,
        "attention.topk_choices": [1, 2, 4],
    },
    "random_layer": {
        "attention.topk_schedule": TopkSchedule.random_layer,
        "attention.topk_choices": [1, 2, 4],
    },
    "aligned": {"attention.align_coeff": 10.0},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_exact_under_resume(tiny_config, run, monkeypatch, name):
    settings = SCHEDULES[name]
    straight = run(tiny_config(**{"run.name": "straight", **settings}))
    config = tiny_config(**{"run.name": "stopped", **settings})
    monkeypatch.setenv(VARIABLE, "sigterm@step=3")
    assert run(config).outcome.step == 3
    monkeypatch.delenv(VARIABLE)
    resumed = run(config)
    assert resumed.curve() == straight.curve()
    ks = [[s["attention/topk"] for s in r.steps if "attention/topk" in s] for r in (straight, resumed)]
    assert ks[0] == ks[1] and len(ks[0]) == 6 and len(set(ks[0])) > 1


def test_dense_steps_train_as_dense_attention_does(tiny_config, run):
    first = run(tiny_config(**{"run.name": "first", "attention.topk_dense_steps": 3}))
    dense = run(tiny_config(**{"run.name": "dense", "attention.kind": "dense"}))
    assert first.curve()[:3] == dense.curve()[:3] and first.curve()[3:] != dense.curve()[3:]


def test_information_is_logged_when_due_and_changes_nothing(tiny_config, run):
    plain = run(tiny_config(**{"run.name": "plain"}))
    settings = {"monitoring.information_every_steps": 2, "parallel.recompute": "selective"}
    measured = run(tiny_config(**{"run.name": "measured", **settings}))
    assert measured.curve() == plain.curve()
    lines = map(json.loads, measured.folder.metrics_file.read_text().splitlines())
    found = {r["step"]: r["values"] for r in lines if "attention/kept_mass_frac" in r.get("values", {})}
    assert sorted(found) == [2, 4, 6]
    for values in found.values():
        shares = [values[f"attention/{x}_mass_frac"] for x in ("window", "kept", "oracle")]
        assert 0 < shares[0] < shares[1] <= shares[2] <= 1 + 1e-6
        assert {f"attention/layer_{n}/oracle_gain_frac" for n in (1, 2)} <= set(values)
    assert not any("kept_mass" in key for step in plain.steps for key in step)


@pytest.mark.parametrize("kind", ["phsa", "dense"])
def test_the_largest_logit_is_logged_when_due_and_changes_nothing(tiny_config, run, kind):
    settings = {"attention.kind": kind, "parallel.recompute": "selective"}
    plain = run(tiny_config(**settings | {"run.name": "plain", "monitoring.max_logit_every_steps": 0}))
    found = {}
    for rows in (4, 128):  # of 2 x 64 tokens
        every = {"monitoring.max_logit_every_steps": 2, "monitoring.max_logit_rows": rows}
        measured = run(tiny_config(**settings | every | {"run.name": f"rows{rows}"}))
        assert measured.curve() == plain.curve()
        records = read_records(measured.folder.metrics_file)
        steps, found[rows] = records.series("attention/max_logit")
        assert steps == [2, 4, 6]
        layers = [records.series(f"attention/layer_{n}/max_logit")[1] for n in (1, 2)]
        assert found[rows] == [max(pair) for pair in zip(*layers, strict=True)]
    assert all(few < every for few, every in zip(found[4], found[128], strict=True))
    assert not any("max_logit" in key for step in plain.steps for key in step)


def test_a_selector_changes_only_the_selection(tiny_config, run):
    """Same data, same weights at the start, same files and tensors in the checkpoint."""
    runs = {}
    for selector in (Selector.phsa, Selector.moba, Selector.nsa, Selector.indexer):
        runs[selector] = run(tiny_config(**settings_of(selector), **{"run.train_steps": 4}))
    states, layouts = [], []
    for finished in runs.values():
        (step,) = finished.folder.committed_steps()
        folder = finished.folder.checkpoints_dir / f"step_{step:08d}"
        state_file = next(p for p in folder.rglob("*.json") if "data_fingerprint" in p.read_text())
        state = json.loads(state_file.read_text())
        states.append((state["data_fingerprint"], state["consumed_sequences"], state["consumed_tokens"]))
        layouts.append(_tensors(folder))
    assert states.count(states[0]) == len(states)
    assert layouts[0] == layouts[1] and len(layouts[0]) > 10
    for layout in layouts[2:]:
        # Weights, of each an fp32 copy and Adam's two moments, and nothing else.
        own = {name for name in layout if ".core_attention." in name}
        assert {name: shape for name, shape in layout.items() if name not in own} == layouts[0]
        weights = {name for name in own if name.startswith("model.") or name.startswith("decoder.")}
        assert weights and len(own) == 4 * len(weights), own
    assert len({tuple(finished.curve()) for finished in runs.values()}) == len(runs)


@pytest.mark.parametrize("selector", [Selector.nsa, Selector.indexer])
def test_a_selector_with_weights_is_exact_under_resume_and_trains_them(
    tiny_config, run, monkeypatch, selector
):
    straight = run(tiny_config(**settings_of(selector) | {"run.name": "straight"}))
    config = tiny_config(**settings_of(selector) | {"run.name": "stopped"})
    monkeypatch.setenv(VARIABLE, "sigterm@step=3")
    assert run(config).outcome.step == 3
    monkeypatch.delenv(VARIABLE)
    resumed = run(config)
    assert resumed.curve() == straight.curve()
    kl = [
        [s["train/index_kl_nats"] for s in r.steps if "train/index_kl_nats" in s] for r in (straight, resumed)
    ]
    assert kl[0] == kl[1] and len(kl[0]) == (6 if selector == Selector.indexer else 0)
    assert all(value > 0 for value in kl[0])


def test_the_alignment_loss_is_logged_by_itself(tiny_config, run):
    plain = run(tiny_config(**{"run.name": "plain"}))
    aligned = run(tiny_config(**{"run.name": "aligned", "attention.align_coeff": 10.0}))
    steps = [s for s in aligned.steps if "train/loss_nats" in s]
    assert all(s["train/align_loss"] > 0 for s in steps) and len(steps) == 6
    assert {s["attention/topk"] for s in steps} == {0.0, 1.0}  # full and sparse steps
    # The first step has the weights of the other run: the same cross-entropy where it is sparse, never the
    # same gradient.
    sparse = tiny_config(
        **{"run.name": "sparse", "attention.align_coeff": 10.0, "attention.align_full_frac": 0.0}
    )
    first, without = run(sparse).steps[0], plain.steps[0]
    assert first["train/loss_nats"] == without["train/loss_nats"]
    assert first["optim/grad_norm"] != without["optim/grad_norm"]
    assert not any("train/align_loss" in s for s in plain.steps)


def settings_of(selector):
    settings = {"run.name": selector.value, "attention.selector": selector}
    settings["attention.mean_weight_frac"] = 0.5 if selector == Selector.phsa else 1.0
    if selector == Selector.nsa:
        settings |= {"attention.block_tokens": 16, "attention.init_tokens": 0, "attention.local_tokens": 16}
        settings["attention.nsa_window_tokens"] = 8
    return settings


def _tensors(folder):
    """Names and shapes of all tensors in a checkpoint."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    place = next(p for p in folder.rglob(".metadata")).parent
    entries = FileSystemReader(place).read_metadata().state_dict_metadata
    return {
        name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
    }
