from pathlib import Path

import pytest

from phsa_megatron.monitoring.metrics import METRICS, lookup, render_markdown

REPOSITORY = Path(__file__).parents[2]


def test_page_in_docs_equals_the_table():
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == render_markdown(), "run: python -m phsa_megatron.monitoring.metrics > docs/metrics.md"


def test_every_row_has_a_unit_a_reduction_and_a_meaning():
    for metric in METRICS.values():
        assert metric.unit and metric.reduction and metric.meaning.endswith("."), metric.name


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train/loss_nats", "train/loss_nats"),
        ("val/loss_nats", "val/loss_nats"),
        ("val/english-prose.v2/bits_per_byte", "val/<domain>/bits_per_byte"),
        ("val/中文/loss_nats", "val/<domain>/loss_nats"),
        ("attention/layer_12/selected_mass_frac", "attention/layer_<n>/selected_mass_frac"),
    ],
)
def test_names_and_patterns_are_found(name, row):
    assert lookup(name).name == row


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train/loss", "train/loss_nats"),
        ("optim/gradnorm", "optim/grad_norm"),
        ("val/prose/bits_per_bite", "val/<domain>/bits_per_byte"),
        ("attention/layer_x/selected_mass_frac", "attention/layer_<n>/selected_mass_frac"),
        ("val/a/b/loss_nats", "val/loss_nats"),
        ("attention/layer_<n>/selected_mass_frac", "attention/layer_<n>/selected_mass_frac"),
        ("val/<domain>/loss_nats", "val/<domain>/loss_nats"),
    ],
)
def test_unknown_name_is_refused_and_the_nearest_is_named(name, nearest):
    with pytest.raises(ValueError, match="not in the metrics table") as caught:
        lookup(name)
    assert f"nearest: {nearest!r}" in str(caught.value)


def test_a_metric_name_is_matched_as_text_not_as_an_expression():
    with pytest.raises(ValueError, match="not in the metrics table"):
        lookup("train/lossXnats")


def test_capture_returns_what_stands_at_the_placeholder():
    row = METRICS["attention/layer_<n>/selected_mass_frac"]
    assert row.capture("attention/layer_7/selected_mass_frac") == "7"
    assert row.capture("attention/layer_7/attended_key_frac") is None
    assert METRICS["optim/lr"].capture("optim/lr") is None
