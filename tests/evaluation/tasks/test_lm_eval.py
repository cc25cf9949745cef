"""lm-eval asks a checkpoint, on data from local folders; the paper's tasks are found under their names."""

import json
import math

import pytest

from phsa_megatron import cli
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.answerer import Request
from phsa_megatron.evaluation.tasks.checkpoint_answerer import open_run
from phsa_megatron.evaluation.tasks.general import GENERAL_TASKS

pytest.importorskip("lm_eval", reason="the extra eval brings it; CI's second leg has it")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from phsa_megatron.evaluation.tasks.lm_eval_model import PhsaLM


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def data_dir(tmp_path):
    """Two of the paper's tasks, in miniature and in the layout of a downloaded repository."""
    piqa = [{"goal": f"open the {n} box", "sol1": "the red key", "sol2": "so and so"} for n in range(4)]
    for split in ("train", "validation"):
        write_lines(
            tmp_path / f"baber/piqa/{split}.jsonl", [r | {"label": i % 2} for i, r in enumerate(piqa)]
        )
    choices = {"text": ["owl", "canoe", "the red lamp", "so"], "label": ["A", "B", "C", "D"]}
    arc = [{"id": str(n), "question": f"which {n}?", "choices": choices, "answerKey": "B"} for n in range(3)]
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / f"allenai/ai2_arc/ARC-Challenge/{split}.jsonl", arc)
    (tmp_path / "allenai/ai2_arc/README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Challenge\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: ARC-Challenge/{split}.jsonl\n"
            for split in ("train", "validation", "test")
        )
        + "---\n",
        encoding="utf-8",
    )
    return tmp_path


def test_tasks_of_the_paper_run_from_a_local_folder(make_run, data_dir, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data_dir / "cache"))
    run, out = make_run("general"), data_dir / "out"
    arguments = ["tasks=[piqa,arc_c]", f"data_dir={data_dir}", "seeds=[3]", "--out", str(out)]
    assert cli.evaluate([str(run), *arguments]) == 0
    records = json.loads((out / "results.json").read_text(encoding="utf-8"))["records"]
    found = {(r["task"], r["metric"]): r for r in records}
    assert {("piqa", "acc"), ("piqa", "acc_norm"), ("arc_challenge", "acc")} <= set(found)
    assert found["piqa", "acc"]["num_samples"] == 4 and found["arc_challenge", "acc"]["num_samples"] == 3
    assert found["piqa", "acc"]["low"] <= found["piqa", "acc"]["mean"] <= found["piqa", "acc"]["high"]
    # By hand: the more likely solution of each goal, against the labels 0, 1, 0, 1.
    with open_run(run) as opened:
        answerer = opened.answerer()
        right = 0
        for number in range(4):
            context = f"Question: open the {number} box\nAnswer:"
            nats = [answerer.loglikelihood(context, f" {s}").nats for s in ("the red key", "so and so")]
            right += (nats[1] > nats[0]) == (number % 2)
    assert found["piqa", "acc"]["mean"] == right / 4
    assert "| piqa | acc, seed 3 |" in (out / "results.md").read_text(encoding="utf-8")


def test_lm_evals_own_command_line_knows_the_model(make_run, data_dir, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(data_dir / "cache"))
    monkeypatch.chdir(data_dir)
    arguments = ["--model", "phsa", "--model_args", f"run={make_run('general')},topk=1", "--tasks", "piqa"]
    assert cli.evaluate(["lm-eval", *arguments, "--output_path", str(data_dir / "lm_eval")]) == 0
    (file,) = (data_dir / "lm_eval").rglob("results_*.json")
    assert "acc,none" in json.loads(file.read_text(encoding="utf-8"))["results"]["piqa"]


@pytest.mark.parametrize(
    ("model_args", "of_lm_eval", "words"),
    [
        ({"topk": 1}, {}, "run=RUN is missing"),
        ({"run": "x", "batch": 3}, {}, "'batch': 3"),
        ({"run": "x"}, {"device": "cuda:1", "batch_size": 1}, "'device': 'cuda:1'"),
        ({"run": "x"}, {"device": "cuda:0", "batch_size": 1}, "x is no run folder"),
    ],
)
def test_wrong_model_arguments_are_answered(model_args, of_lm_eval, words):
    with pytest.raises(ConfigError, match=words):
        get_model("phsa").create_from_arg_obj(model_args, of_lm_eval)


def requests(kind, *arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_requests_are_answered_as_the_answerer_does(make_run):
    with open_run(make_run("general")) as opened:
        answerer = opened.answerer(max_tokens=40)
        model = PhsaLM(answerer=answerer)
        pairs = [("the red lamp", " and so"), ("", "so and"), ("owl ", "canoe")]
        found = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        for (nats, greedy), pair in zip(found, pairs, strict=True):
            expected = answerer.loglikelihood(*pair)
            assert nats == pytest.approx(expected.nats, abs=1e-3) and greedy == expected.is_greedy
        # A text of more tokens than the model takes: each token once, those of the first window in full.
        text = "the red lamp and the amber canoe, so and so. " * 6
        ids = model.tok_encode(text)
        assert len(ids) > 80
        (total,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
        first = answerer.score([Request([answerer.eod_id, *ids[:39]], 1)])[0].logprobs
        by_hand = first.double().sum().item()
        for start in range(39, len(ids), 39):
            end = min(start + 39, len(ids))
            window = ids[end - 40 : end]
            by_hand += answerer.score([Request(window, 40 - (end - start))])[0].logprobs.double().sum().item()
        assert total == pytest.approx(by_hand, abs=1e-2) and math.isfinite(total)
        settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
        short = answerer.generate(["the red"], 8, ["\n"])
        assert (
            model.generate_until(requests("generate_until", ("the red", settings)), disable_tqdm=True)
            == short
        )
        # The end of a prompt that is too long is kept.
        (cut,) = model.generate_until(requests("generate_until", (text, settings)), disable_tqdm=True)
        assert cut == answerer.generate([answerer.decode(ids[-32:])], 8, ["\n"])[0]


@pytest.fixture(scope="module")
def task_index():
    """What lm-eval knows, by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def first_leaf(index, name):
    """Return the settings of the first task of a group or tag, or of the task itself; without its data."""
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = index[name]
    if entry.kind is Kind.TAG:
        return first_leaf(index, next(k for k, e in index.items() if name in e.tags and e.kind is Kind.TASK))
    settings = load_yaml(entry.yaml_path, resolve_func=False)
    if entry.kind is Kind.GROUP:
        child = settings["task"][0]
        return first_leaf(index, child if isinstance(child, str) else child["task"])
    return settings


@pytest.mark.parametrize("name", GENERAL_TASKS)
def test_lm_eval_knows_each_task_and_its_dataset(name, task_index):
    task = GENERAL_TASKS[name]
    assert first_leaf(task_index, task.task)["dataset_path"] == task.dataset
