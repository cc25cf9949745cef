import json
import sys

import pytest

from phsa_megatron import cli
from phsa_megatron.config.planning import report

RECIPE = "recipe=phsa_8b_pretrain_8gpu_h100_bf16_32k"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def run(capsys, *argv):
    code = cli.main(["plan", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_plan_says_what_is_best_why_and_what_it_rests_on(capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run(capsys, RECIPE, "--gpu-hour-cost", "2.5", "--json", str(file))
    assert code == 0
    for words in ("as written", "too big", "out of memory by", "GiB more than there is", "USD/M tokens"):
        assert words in out
    for words in ("measured", "assumed", "kernels/benchmarks/results/h100.json", "Taken for granted"):
        assert words in out
    plan = json.loads(file.read_text())
    best = plan["best"][0]
    assert f"{best['tokens_per_s']:,.0f}" in out
    assert " ".join(best["settings"])[:60] in out
    assert best["usd_per_million_tokens"] == pytest.approx(8 * 2.5 / 3600 / best["tokens_per_s"] * 1e6)
    assert {value["kind"] for value in plan["inputs"].values()} == {"measured", "assumed"}
    assert plan["points"] == []
    assert plan["as_written"]["fits"]
    parts = [best["memory"][f"{name}_gib"] for name in ("weights", "grads", "optimizer", "activations")]
    rest = best["memory"]["gathered_kv_gib"] + best["memory"]["working_gib"]
    assert best["memory"]["total_gib"] == pytest.approx(sum(parts) + rest)
    assert [layout["over_gib"] > 0 for layout in plan["too_big"]] == [True] * 3


def test_one_gpu_that_cannot_hold_the_model_is_told_what_is_missing(capsys):
    code, out, _ = run(capsys, RECIPE, "cluster.processes_per_node=1")
    assert code == 0
    assert "1 GPU, 32 sequences" in out
    assert "No layout fits. The smallest" in out
    assert "GiB more than there is" in out
    assert "The run as written breaks a rule: cluster.processes_per_node=1" in out


def test_the_plot_is_written_with_its_points(capsys, tmp_path):
    plot, numbers = tmp_path / "plan.svg", tmp_path / "plan.json"
    code, out, _ = run(
        capsys, RECIPE, "--plot", str(plot), "--plot-gpus", "16", "--json", str(numbers), "--top", "1"
    )
    assert code == 0
    assert f"wrote {plot}" in out.replace("\n", "")
    text = plot.read_text()
    assert text.startswith("<?xml") and len(text) > 20_000
    points = json.loads(numbers.read_text())["points"]
    assert len(points) == 2 * 2 + 2 * 6
    assert {point["attention"] for point in points} == {"phsa", "dense"}
    assert max(point["seq_len_tokens"] for point in points) == 1048576


def test_without_matplotlib_the_plot_is_refused_at_once(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = run(capsys, RECIPE, "--plot", str(tmp_path / "plan.png"))
    assert (code, out) == (2, "")
    assert "install matplotlib" in err
    assert run(capsys, RECIPE)[0] == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([RECIPE, "--gpu-hour-cost", "0"], "--gpu-hour-cost 0: it must be more than 0"),
        ([RECIPE, "--nvlink", "-1"], "--nvlink -1: it must be more than 0"),
        ([RECIPE, "--top", "0"], "--top 0"),
        ([RECIPE, "--compare", "nowhere.json"], "no such file"),
        ([RECIPE, "--plot-gpus", "4", "--plot", "x.png"], "--plot-gpus 4"),
        (["recipe=phsa_demo_cpu"], "cluster.memory_gib=None"),
        ([RECIPE, "optim.lrr=1"], "Did you mean optim.lr"),
    ],
)
def test_errors_are_messages(capsys, argv, words):
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert words in err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for option in ("--json", "--plot", "--gpu-hour-cost", "--compare", "--network", "--recipes-dir"):
        assert option in out


def test_every_assumption_is_printed(capsys):
    _, out, _ = run(capsys, RECIPE)
    flat = " ".join(out.split())
    for line in report.ASSUMPTIONS:
        assert line in flat
