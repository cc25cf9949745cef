import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from phsa_megatron import cli
from phsa_megatron.config.compose import compose
from phsa_megatron.evaluation.compare import mean_and_spread, plan, write

DEMO = "recipe=phsa_demo_cpu"
ROOT = Path(__file__).parents[2]


def test_runs_differ_in_selector_and_seed_and_have_the_recipes_budget(tmp_path):
    names = ["phsa", "random_tokens", "moba", "separators", "window", "dense", "nsa", "indexer"]
    runs = plan(names, ["1", "2"], [DEMO, "attention.train_topk=3"], tmp_path, own_settings=False)
    assert [(name, seed) for name, seed, _ in runs] == [(n, s) for n in names for s in (1, 2)]
    configs = {name: compose(arguments).config for name, _, arguments in runs}
    for name, config in configs.items():
        attention = config.attention
        if name != "dense":
            assert (attention.init_tokens, attention.local_tokens, attention.train_topk) == (16, 64, 3)
        if name in ("phsa", "random_tokens"):
            assert attention.punctuation_language == "en_zh"  # the demo's, not the file's
        assert config.run.name == f"{name}-seed2" and config.run.root_dir == str(tmp_path)
    assert configs["nsa"].attention.nsa_window_tokens == 64  # the recipe's local window
    assert len({(c.attention.kind, c.attention.selector) for c in configs.values()}) == len(names)


def test_another_block_size_needs_own_settings(tmp_path, capsys):
    arguments = [DEMO, "selectors=[phsa,infllm_v2_block64]", "seeds=[1]", "--out", str(tmp_path)]
    assert cli.main(["compare", *arguments]) == 2
    assert "blocks of 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seeds=[1]"], "selectors=[...] is missing"),
        (["selectors=[phsa]"], "seeds=[...] is missing"),
        (["selectors=[fhsa]", "seeds=[1]"], "Did you mean phsa"),
        (["selectors=[phsa]", "seeds=[a]"], "'a' is not a whole number"),
        (["selectors=[phsa]", "seeds=[1,1]"], "at most once"),
        (["selectors=[phsa]", "seeds=[1]", "run.seed=3"], "compare sets run.seed itself"),
    ],
)
def test_wrong_arguments_are_answered(arguments, words, capsys):
    assert cli.main(["compare", DEMO, *arguments]) == 2
    assert words in capsys.readouterr().err


def _record(selector, seed, loss, tokens=100):
    values = {"val/loss_nats": loss}
    shared = {"sparsity_mean_frac": 0.5, "flops_per_token": 1e7, "steps": 3, "packages": {}}
    return {"selector": selector, "seed": seed, "tokens": tokens, "values": values, **shared}


def test_the_table_has_mean_spread_and_differences_by_seed(tmp_path):
    records = [_record("a", 1, 2.0), _record("a", 2, 4.0, 99), _record("b", 1, 1.5), _record("b", 2, 3.0, 99)]
    text = write(tmp_path, records, [DEMO])
    assert f"| a | 3.0000 ± {math.sqrt(2):.4f} |" in text
    # By seed b is 0.5 and 1.0 lower: the spread of the difference is not that of the losses.
    assert re.search(r"\| b \| 2.2500 ± 1.0607 \| -0.7500 ± 0.3536 \|", text)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "compare.json").read_text())["records"] == records


def test_unequal_budgets_are_refused(tmp_path):
    from phsa_megatron.config.errors import TrainingError

    with pytest.raises(TrainingError, match="seed 1: runs had different"):
        write(tmp_path, [_record("a", 1, 2.0), _record("b", 1, 2.0, tokens=99)], [])


def test_one_seed_has_no_spread():
    mean, spread = mean_and_spread([2.5])
    assert mean == 2.5 and math.isnan(spread)
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2))


@pytest.mark.slow
def test_the_cpu_demo_is_compared_at_toy_size_and_a_second_start_trains_nothing(tmp_path):
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "launch"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def phsa_train(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "phsa_megatron.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    phsa_train("prepare-demo")
    toy = "run.train_steps=4 optim.warmup_steps=1 optim.decay_steps=1 checkpoint.save_every_steps=0 "
    toy += "evaluate.every_steps=0 evaluate.num_sequences_per_domain=2 run.sample_prompts=[] "
    toy += "monitoring.wandb.mode=disabled monitoring.report=false run.num_threads=1 model.num_layers=1 "
    toy += "optim.global_batch_sequences=2 optim.micro_batch_sequences=2 monitoring.information_every_steps=2"
    command = ["compare", DEMO, *toy.split(), "selectors=[phsa,window]", "seeds=[1,2]", "--out", "runs/toy"]
    table = phsa_train(*command)
    assert re.search(r"\| window \| [\d.]+ ± [\d.]+ \|", table)
    records = json.loads((tmp_path / "runs/toy/compare.json").read_text())["records"]
    assert {(r["selector"], r["seed"]) for r in records} == {
        (n, s) for n in ("phsa", "window") for s in (1, 2)
    }
    assert len({r["values"]["val/loss_nats"] for r in records}) == 4
    assert all(0 < r["values"]["attention/kept_mass_frac"] < 1 for r in records)
    assert (tmp_path / "runs/toy/compare.png").read_bytes().startswith(b"\x89PNG")
    written = (tmp_path / "runs/toy/phsa-seed1/done").stat().st_mtime_ns
    assert phsa_train(*command) == table
    assert (tmp_path / "runs/toy/phsa-seed1/done").stat().st_mtime_ns == written

    run = str(tmp_path / "runs/toy/phsa-seed1")
    command = [
        "information-loss",
        run,
        "--selectors",
        "phsa",
        "minmax",
        "--topk",
        "1",
        "4",
        "--sequences",
        "2",
    ]
    phsa_train(*command)
    results = json.loads(
        (tmp_path / "runs/toy/phsa-seed1/information_loss/information_loss.json").read_text()
    )
    assert [(r["selector"], r["topk"]) for r in results] == [
        ("phsa", 1),
        ("phsa", 4),
        ("minmax", 1),
        ("minmax", 4),
    ]
    for result in results:
        total = result["total"]
        assert 0 < total["window_mass_frac"] < total["kept_mass_frac"] <= total["oracle_mass_frac"] + 1e-6
    assert results[1]["total"]["kept_mass_frac"] > results[0]["total"]["kept_mass_frac"]
    for name in ("mass.png", "layers_and_heads.png"):
        assert (tmp_path / "runs/toy/phsa-seed1/information_loss" / name).read_bytes().startswith(b"\x89PNG")
