"""`phsa-eval` from the command line to the files, on runs with random weights."""

import json

import pytest

from phsa_megatron import cli
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.checkpoint_answerer import CheckpointAnswerer
from phsa_megatron.evaluation.tasks.settings import ALL_TASKS, EvalSettings, describe, parse

SMALL = ["trials=2", "depths=[0,1]", "lengths=[256]"]


@pytest.fixture
def silent(monkeypatch):
    """Every answer is empty: what a model generates is shown elsewhere."""
    monkeypatch.setattr(CheckpointAnswerer, "continued", lambda self, ids, num_tokens: [self.eod_id])


@pytest.fixture
def texts_dir(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the amber canoe and so the red owl. " * 12, encoding="utf-8")
    (tmp_path / "texts" / "b.txt").write_text("so and " * 80, encoding="utf-8")
    return tmp_path / "texts"


def read(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_training_k_by_inference_k_perplexity_and_sparsity(make_run, silent, texts_dir, tmp_path, capsys):
    runs = [str(make_run(f"k{k}", train_topk=k)) for k in (1, 2)]
    arguments = [
        *runs,
        "tasks=[needle,perplexity]",
        "topk=[1,4]",
        "selectors=[own,dense]",
        f"texts_dir={texts_dir}",
    ]
    out = tmp_path / "out"
    assert cli.evaluate([*arguments, *SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "needle at 256: 4 of 4" in printed.err
    results = read(out)
    needles = [r for r in results["records"] if r["task"] == "needle" and r["depth"] is None]
    # Two runs, each with two k and dense, which has no k.
    assert [(r["train_topk"], r["selector"], r["infer_topk"]) for r in needles] == [
        (k, *way) for k in (1, 2) for way in (("phsa", 1), ("phsa", 4), ("dense", None))
    ]
    assert all(r["num_samples"] == 4 and r["method"] == "wilson" and r["step"] == 7 for r in needles)
    assert all(0 <= r["low"] <= r["mean"] <= r["high"] <= 1 for r in needles)
    parts = [r for r in results["records"] if r["task"] == "perplexity"]
    assert {(r["first"], r["end"]) for r in parts} == {(1, 128), (128, 256)}
    assert all(r["low"] <= r["mean"] <= r["high"] and r["num_samples"] == 2 for r in parts)
    # Windows of 4 + 8 tokens and k blocks of 4, of 256 tokens.
    sparsity = {(r["selector"], r["infer_topk"]): r["last_token_frac"] for r in results["sparsity"]}
    assert sparsity == {("phsa", 1): 1 - 16 / 256, ("phsa", 4): 1 - 28 / 256, ("dense", None): 0.0}
    page = (out / "results.md").read_text(encoding="utf-8")
    for words in ("| trained with | k = 1 | k = 4 |", "| k = 2 |", "## Loss by position", "93.75% /"):
        assert words in page, words
    for file in ("needle.png", "matrix_needle_phsa.png", "perplexity.png", "needle_k1_phsa_k_4_step_7.png"):
        assert (out / file).read_bytes().startswith(b"\x89PNG"), file


def test_the_page_says_what_is_generated_without_a_cache(make_run, silent, tmp_path):
    arguments = ["tasks=[multi_value]", "trials=1", "lengths=[320]", "selectors=[own,minmax]"]
    assert cli.evaluate([str(make_run("again")), *arguments, "--out", str(tmp_path)]) == 0
    reasons = {r["selector"]: r["without_cache"] for r in read(tmp_path)["records"]}
    assert reasons["phsa"] is None
    assert reasons["minmax"].startswith(
        "attention.selector=minmax: generation with a cache keeps two running"
    )
    generation = (tmp_path / "results.md").read_text(encoding="utf-8").split("## Generation\n\n")[1]
    assert generation == f"- again, minmax, k = 2, step 7: generated without a cache: {reasons['minmax']}\n"


def test_the_same_command_asks_only_what_is_missing(make_run, silent):
    run = make_run("again")
    out = run / "evaluation"
    assert cli.evaluate([str(run), "tasks=[multi_value]", "trials=2", "lengths=[320]"]) == 0
    first = read(out)["records"]
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 2
    # The second answer was cut short by a kill; the first is changed, so that it shows if it is used.
    changed = json.loads(lines[0]) | {"score": 0.25}
    (out / "samples.jsonl").write_text(json.dumps(changed) + "\n" + lines[1][:20], encoding="utf-8")
    assert cli.evaluate([str(run), "tasks=[multi_value]", "trials=2", "lengths=[320]"]) == 0
    again = read(out)["records"]
    assert first[0]["mean"] == 0.0 and again[0]["mean"] == 0.125
    assert (out / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[1] == lines[1]


def test_longbench_from_a_folder(make_run, tmp_path):
    run = make_run("again")
    record = {"context": "c " * 600, "input": "Where?", "answers": ["Oslo"], "_id": "x"}
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    arguments = [str(run), "tasks=[hotpotqa]", f"longbench_dir={tmp_path}", "--out", str(tmp_path / "out")]
    assert cli.evaluate(arguments) == 0
    (found,) = read(tmp_path / "out")["records"]
    assert (found["task"], found["metric"], found["num_samples"]) == ("hotpotqa", "qa_f1", 1)
    assert "| hotpotqa | qa_f1 |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which model?"),
        (["RUN", "RUN"], "a model is there twice"),
        (["RUN", "other"], "several models: --out FOLDER"),
        (["nowhere"], "neither a run folder (config.yaml) nor a transformers folder"),
        (["RUN", "trails=3"], "unknown setting 'trails'. Did you mean trials"),
        (["RUN", "trials=many"], "trials: Value 'many'"),
        (["RUN", "trials=0"], "must be at least 1"),
        (["RUN", "depths=[1.5]"], "0 to 1"),
        (["RUN", "tasks=[nedle]"], "Did you mean needle"),
        (["RUN", "selectors=[fhsa]"], "Did you mean phsa"),
        (["RUN", "seeds=[1,1]"], "at most once"),
        (["RUN", "tasks=[longbench]"], "longbench_dir=FOLDER is missing"),
        (["RUN", "tasks=[perplexity]"], "texts_dir=FOLDER is missing"),
        (["RUN", "tasks=[arc_c]"], "data_dir=FOLDER is missing: this task reads allenai/ai2_arc"),
        (["RUN", "tasks=[mine]", "include_dir=x"], "data_dir=FOLDER is missing"),
        (["RUN", "attention=eager"], "is of transformers folders"),
        (["RUN", "lengths=[1024]", "tasks=[needle]"], "takes texts of up to 512 tokens"),
    ],
)
def test_wrong_arguments_are_answered(arguments, words, make_run, capsys):
    run = str(make_run("again"))
    assert cli.evaluate([run if word == "RUN" else word for word in arguments]) == 2
    assert words in capsys.readouterr().err


def test_data_that_is_missing_is_named_with_its_folder(make_run, tmp_path, capsys):
    arguments = [str(make_run("again")), "tasks=[arc_c,hellaswag]", f"data_dir={tmp_path}"]
    assert cli.evaluate(arguments) == 2
    message = capsys.readouterr().err
    assert "allenai/ai2_arc, Rowan/hellaswag not found" in message and f"into {tmp_path}" in message


def test_help_names_every_setting_and_list_every_task(capsys):
    with pytest.raises(SystemExit):
        cli.evaluate(["--help"])
    printed = capsys.readouterr().out
    assert describe() in printed and "tasks=[long]" in printed and "step=null" in printed
    assert cli.evaluate(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(task in printed for task in ALL_TASKS)


def test_groups_stand_for_their_tasks_each_once():
    assert parse(["tasks=[needle,long]"]).chosen[0] == "needle"
    assert len(parse(["tasks=[needle,long]"]).chosen) == 5
    assert EvalSettings().chosen == list(ALL_TASKS[:5])
    with pytest.raises(ConfigError, match="tasks=\\[\\]: at least one"):
        parse(["tasks=[]"])
