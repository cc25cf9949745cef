"""The whole pipeline at toy size: text to sets, units to records, a stop and a resume, records to a page."""

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch

from phsa_megatron.config.errors import ConfigError, TrainingError
from phsa_megatron.data import demo
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.manifest import FileRecord
from phsa_megatron.evaluation.claim_study import command, texts, unit_run
from phsa_megatron.evaluation.claim_study.measure import measure
from phsa_megatron.evaluation.claim_study.unit_run import claimed
from phsa_megatron.evaluation.claim_study.units import make_units

pytestmark = pytest.mark.slow

VARIANTS = ["phsa_en_zh", "dense", "infllm_v2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Sets of a few demo documents, made by the command itself."""
    folder = tmp_path_factory.mktemp("prepared")
    lines = [
        json.dumps({"text": "\n".join(f"Line {n} of page {page}: {n * page}." for n in range(60))})
        for page in range(80)
    ]
    (folder / "manuals.jsonl").write_text("\n".join(lines))
    (folder / "verse.jsonl").write_text("\n".join(lines).replace("Line", "行"))
    few = {"english": 24, "chinese": 24}
    patch = pytest.MonkeyPatch()
    patch.setattr(
        texts,
        "read_texts",
        lambda language, split: itertools.islice(demo.read_texts(language, split), few[language]),
    )
    arguments = ["--text", f"english_manuals={folder}/manuals.jsonl", f"chinese_verse={folder}/verse.jsonl"]
    arguments += ["--vocab-size", "1024", "--retrieval", "40", "--retrieval-tokens", "256"]
    arguments += ["--max-tokens", "english_manuals=30000", "--output", str(folder / "sets")]
    assert command.main(["prepare", *arguments]) == 0
    patch.undo()
    return folder / "sets"


def settings(prepared):
    sources = [
        f"data.sources.{name}.{split}_prefix={prepared}/{name}_{split}"
        for name in (
            "english_prose",
            "english_manuals",
            "chinese_prose",
            "chinese_verse",
            "retrieval_english",
            "retrieval_chinese",
        )
        for split in ("train", "valid")
    ]
    model = ["num_layers=2", "hidden_size=32", "ffn_hidden_size=64", "num_query_heads=2", "num_kv_heads=1"]
    return [
        *sources,
        *(f"model.{item}" for item in [*model, "head_dim=16", "vocab_size=1024"]),
        f"data.tokenizer_file={prepared}/tokenizer.json",
        "data.seq_len_tokens=256",
        "cluster=local_cpu",
        "run.dtype=fp32",
        "run.num_threads=1",
        "run.train_steps=6",
        "attention.impl=reference",
        "compute.norm=torch",
        "attention.local_tokens=32",
        "optim.global_batch_sequences=2",
        "optim.micro_batch_sequences=2",
        "optim.warmup_steps=2",
        "optim.decay_steps=2",
        "monitoring.log_every_steps=2",
        "evaluate.num_sequences_per_domain=2",
        "evaluate.micro_batch_sequences=2",
    ]


def run(prepared, out, *more, variants=VARIANTS):
    measures = ["--lengths", "128", "--trials", "1", "--prepared", str(prepared), "--out", str(out)]
    changed = {item.partition("=")[0] for item in more}
    kept = [item for item in settings(prepared) if item.partition("=")[0] not in changed]
    return command.main(["run", *kept, *measures, *more, "--seeds", "0", "--variants", *variants])


def read(out, name):
    return json.loads((out / "units" / f"{name}-seed0.json").read_text())


@pytest.fixture(scope="module")
def out(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    assert run(prepared, folder) == 0
    return folder


def test_no_document_is_on_both_sides(prepared):
    for domain in ("english_prose", "chinese_prose", "english_manuals"):
        tokenizer = FileRecord.of(prepared / "tokenizer.json").sha256
        source = {s: IndexedSource(prepared / f"{domain}_{s}", tokenizer) for s in ("train", "valid")}
        documents = {split: {s.tokens(n).tobytes() for n in range(len(s))} for split, s in source.items()}
        assert documents["train"] and documents["valid"]
        assert not documents["train"] & documents["valid"]


def test_every_unit_is_trained_and_asked_alike(out):
    records = {name: read(out, name) for name in VARIANTS}
    for key in ("first_weights_sha256", "data_fingerprint", "tokens", "steps"):
        assert len({record[key] for record in records.values()}) == 1, key
    assert records["dense"]["tokens"] == 6 * 2 * 256
    own = records["phsa_en_zh"]["views"]
    assert list(own) == ["k1", "k2", "k4", "k8", "k16", "dense"]
    # 3 tasks, 2 languages, 5 depths.
    assert len(own["k2"]["needles"]) == 30
    assert (
        set(own["k2"]["mass"])
        == set(own["k2"]["nats_and_tokens_by_sequence"])
        == {
            "english_prose",
            "english_manuals",
            "chinese_prose",
            "chinese_verse",
            "retrieval_english",
            "retrieval_chinese",
        }
    )
    sparse = records["dense"]["views"]
    assert {"dense", "phsa_en_zh/k1", "infllm_v2/k16"} <= set(sparse)


def test_more_blocks_are_nearer_to_dense(out):
    """k = 16 of 13 candidates is everything: the dense view has to agree, and k = 1 not to."""
    views = read(out, "dense")["views"]

    def nats(name):
        return [x for rows in views[name]["nats_and_tokens_by_sequence"].values() for x, _ in rows]

    for name in ("phsa_en_zh/k16", "infllm_v2/k16"):
        assert nats(name) == pytest.approx(nats("dense"), rel=2e-5)
    assert nats("phsa_en_zh/k1") != pytest.approx(nats("dense"), rel=2e-5)


def test_losses_by_position_and_by_sequence_are_the_same_sum(out):
    view = read(out, "phsa_en_zh")["views"]["k2"]
    for domain, rows in view["nats_and_tokens_by_sequence"].items():
        for i in range(2):
            by_position = sum(cell[i] for cell in view["nats_and_tokens_by_position"][domain])
            assert by_position == pytest.approx(sum(row[i] for row in rows), rel=1e-6)


@pytest.mark.parametrize(("before", "views_left"), [(3, 6), (6 + 2, 4)])
def test_a_unit_that_was_left_goes_on_to_the_same_record(
    prepared, out, tmp_path, monkeypatch, before, views_left
):
    """In training, and between two views: what was evaluated is not evaluated again."""
    first = read(out, "phsa_en_zh")
    asked = iter([False] * before + [True] * 1000)
    monkeypatch.setattr(command, "run_unit", _leaving(command.run_unit, lambda: next(asked)))
    assert run(prepared, tmp_path, variants=["phsa_en_zh"]) == 0
    assert not (tmp_path / "units").exists()
    monkeypatch.undo()
    measured = []
    monkeypatch.setattr(
        unit_run, "measure", lambda *words: measured.append(words[-1].name) or measure(*words)
    )
    assert run(prepared, tmp_path, variants=["phsa_en_zh"]) == 0
    assert measured == list(first["views"])[-views_left:]
    again = read(tmp_path, "phsa_en_zh")
    assert again["tokens"] == first["tokens"] and again["seconds"]["train"] > 0
    assert again["views"] == first["views"] and again["train_loss_nats"] == first["train_loss_nats"]


def test_what_a_view_lacks_does_not_cost_the_training(prepared, out, tmp_path, monkeypatch):
    """The unit goes on behind its training and the views before, and only with the measures of then."""
    first = read(out, "phsa_en_zh")

    def fails_at_k4(model, questions, view):
        if view.name == "k4":
            raise torch.OutOfMemoryError("too large")
        return measure(model, questions, view)

    train, evaluate, before_s, after_s = unit_run._train, unit_run._evaluate, [], []
    monkeypatch.setattr(
        unit_run, "_train", lambda run, *more: before_s.append(run.state.wall_s) or train(run, *more)
    )
    monkeypatch.setattr(
        unit_run, "_evaluate", lambda run, *more: after_s.append(run.state.wall_s) or evaluate(run, *more)
    )
    monkeypatch.setattr(unit_run, "measure", fails_at_k4)
    with pytest.raises(torch.OutOfMemoryError):
        run(prepared, tmp_path, variants=["phsa_en_zh"])
    monkeypatch.setattr(unit_run, "train_step", None)
    with pytest.raises(TrainingError, match=r"views\.json has views measured with"):
        run(prepared, tmp_path, "--trials", "2", variants=["phsa_en_zh"])
    measured = []
    monkeypatch.setattr(
        unit_run, "measure", lambda *words: measured.append(words[-1].name) or measure(*words)
    )
    assert run(prepared, tmp_path, variants=["phsa_en_zh"]) == 0
    assert measured == list(first["views"])[2:]
    assert before_s[0] == 0 and before_s[1] == after_s[0], "evaluation is no time of training"
    assert read(tmp_path, "phsa_en_zh")["views"] == first["views"]


def _leaving(original, should_leave):
    def wrapped(out, unit, views, questions, _, *more):
        return original(out, unit, views, questions, should_leave, *more)

    return wrapped


def test_finished_units_are_kept_and_other_settings_refused(prepared, out, capsys):
    before = {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    assert run(prepared, out) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (out / "units").iterdir()}
    # A record from before a setting existed is of its default.
    path = out / "units" / "dense-seed0.json"
    record = json.loads(path.read_text())
    assert record["settings"].pop("attention.select_impl") is None
    path.write_text(json.dumps(record))
    assert run(prepared, out) == 0
    with pytest.raises(TrainingError, match=r"other settings \(optim.lr\)"):
        run(prepared, out, "optim.lr=3e-3")


def test_units_are_shared_out_among_processes(prepared, tmp_path, capsys):
    """A process that finds a unit taken goes to the next, and one that ended holds nothing."""
    names = ["mean_pool", "phsa_en_zh"]
    first, second = make_units(names, [0], settings(prepared), tmp_path)
    with claimed(tmp_path, first) as mine, claimed(tmp_path, second) as other:
        assert mine and other
        assert run(prepared, tmp_path, variants=names) == 0
    said = capsys.readouterr().out
    assert "0 of 2 units are finished, 2 were taken by other processes" in said
    with claimed(tmp_path, first):
        assert run(prepared, tmp_path, variants=names) == 0
    assert [path.stem for path in (tmp_path / "units").iterdir()] == [second.name]
    assert "1 of 2 units are finished, 1 were taken" in capsys.readouterr().out
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX); sys.exit(3)"
    held = [sys.executable, "-c", code, str(tmp_path / "claims" / first.name)]
    assert subprocess.run(held, check=False).returncode == 3
    with claimed(tmp_path, first) as mine:
        assert mine, "a claim ends with its process"


def test_settings_may_stand_behind_a_list(prepared, tmp_path, capsys):
    words = ["plan", "--seeds", "0", "1", *settings(prepared), "--tokens-per-s", "100"]
    assert command.main([*words, "--variants", "dense", "mean_pool"]) == 0
    assert "4 units" in capsys.readouterr().out


def test_a_study_without_a_choice_is_refused(prepared, tmp_path):
    with pytest.raises(ConfigError, match="at least 50% must"):
        run(prepared, tmp_path, "attention.local_tokens=192")


def test_the_page_is_made_of_the_records(out, tmp_path):
    assert command.main(["page", "--out", str(out), "--page", str(tmp_path / "claim")]) == 0
    text = (tmp_path / "claim.md").read_text()
    assert "How far is it from dense?" in text and "in 6 steps of 2 sequences of 256" in text
    # As the page says, from the file beside it.
    (said,) = re.findall(r"claim-study page --out (\S+)`", text)
    again = ["page", "--out", str(tmp_path / said), "--page", str(tmp_path / "again" / "claim")]
    assert command.main(again) == 0
    assert (tmp_path / "again" / "claim.md").read_text() == text


def test_the_plan_adds_up(prepared, tmp_path, capsys):
    overrides = settings(prepared)
    assert command.main(["plan", *overrides, "--tokens-per-s", "100", "--seeds", "0"]) == 0
    said = capsys.readouterr().out
    assert "9 units" in said and make_units(["dense"], [0], overrides, tmp_path)[0].name in said
