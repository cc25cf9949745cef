import pytest

from phsa_megatron.config.derive import derive
from phsa_megatron.config.schema import Selector, TopkSchedule
from phsa_megatron.config.topk_schedule import StepTopk, changes_over_steps, step_topk


def schedule(changed, **settings):
    config = changed({f"attention.{key}": value for key, value in settings.items()})
    return [step_topk(config, step) for step in range(1, 41)]


def test_constant_is_train_topk_in_every_step(changed):
    assert schedule(changed) == [StepTopk(2)] * 40
    assert not changes_over_steps(changed({}).attention)


def test_anneal_starts_at_its_start_falls_and_stays_at_train_topk(changed):
    ks = [
        s.topk
        for s in schedule(changed, topk_schedule=TopkSchedule.anneal, topk_start=32, topk_anneal_steps=20)
    ]
    assert ks[0] == 32 and ks[20:] == [2] * 20
    assert ks == sorted(ks, reverse=True) and len(set(ks)) > 8
    assert ks[10] == 8, "half-way in steps is half-way in factors: sqrt(32 * 2)"


def test_dense_steps_come_first_and_the_schedule_begins_after_them(changed):
    steps = schedule(
        changed,
        topk_dense_steps=5,
        topk_schedule=TopkSchedule.anneal,
        topk_start=8,
        topk_anneal_steps=4,
    )
    assert [s.is_dense for s in steps] == [True] * 5 + [False] * 35
    assert steps[5].topk == 8 and steps[9].topk == 2
    assert steps[0].mean == 0


def test_random_step_draws_every_choice_and_depends_on_seed_and_step_only(changed):
    settings = dict(topk_schedule=TopkSchedule.random_step, topk_choices=[1, 2, 4, 8])
    ks = [s.topk for s in schedule(changed, **settings)]
    assert set(ks) == {1, 2, 4, 8}
    assert [s.topk for s in schedule(changed, **settings)] == ks
    other = changed({"run.seed": 5, **{f"attention.{k}": v for k, v in settings.items()}})
    assert [step_topk(other, step).topk for step in range(1, 41)] != ks


def test_random_layer_draws_for_each_layer(changed):
    steps = schedule(changed, topk_schedule=TopkSchedule.random_layer, topk_choices=[1, 2, 4])
    num_layers = changed({}).model.num_layers
    assert {len(s.by_layer) for s in steps} == {num_layers}
    assert all(s.topk == max(s.by_layer) for s in steps)
    assert any(len(set(s.by_layer)) > 1 for s in steps)
    assert {k for s in steps for k in s.by_layer} == {1, 2, 4}
    assert steps[0].mean == sum(steps[0].by_layer) / num_layers


def test_draws_do_not_change_between_versions_of_this_code(changed):
    """A resumed run would otherwise go on with other draws than it began with."""
    settings = dict(topk_schedule=TopkSchedule.random_step, topk_choices=[1, 2, 4, 8])
    assert [s.topk for s in schedule(changed, **settings)][:12] == [8, 1, 4, 8, 1, 4, 4, 8, 8, 1, 8, 4]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["selector = phsa", "sparsity at the last token", "mean over causal positions", "(k = 2)"]),
        ({"selector": Selector.window, "mean_weight_frac": 1.0}, ["selector = window", "(nothing selected)"]),
        ({"dense_layers": [2, 1]}, ["full causal attention, 0% sparse = 1, 2 of"]),
        ({"topk_dense_steps": 7}, ["k over the steps = dense for 7 steps, then 2"]),
        (
            {"topk_schedule": TopkSchedule.random_step, "topk_choices": [1, 4]},
            ["one of 1, 4 drawn per step"],
        ),
    ],
)
def test_what_is_selected_is_printed_at_the_start(changed, settings, words):
    config = changed({f"attention.{key}": value for key, value in settings.items()})
    text = "\n".join(derive(config).equations())
    assert all(word in text for word in words), text
