"""Trials that are read together are answered as each by itself; a study goes on where it stopped."""

import argparse
import json

import pytest
import torch

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation import needle_study, study_setup
from phsa_megatron.evaluation.needle_study import Reader
from phsa_megatron.evaluation.needles import make_needle
from phsa_megatron.evaluation.probe_attention import SELECTORS
from phsa_megatron.evaluation.selector_study import main
from phsa_megatron.evaluation.study_setup import Study, cells_of, read_cells

TOKENS = 448
SMALL = ["window", "phsa"]


@pytest.fixture
def study(byte_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(study_setup, "text_of", lambda name, essays: f"{name}: some words, and more. " * 90)

    def make(device="cpu"):
        arguments = argparse.Namespace(
            model=byte_llama, out=tmp_path, essays_dir=None, dtype="float32", device=device, deadline_s=None
        )
        return Study(arguments, "needles")

    return make


def _needles(study, count):
    ids, _ = study.text("prose")
    return [make_needle(study.tokenizer, ids, TOKENS, n) for n in range(count)]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_trials_read_together_are_answered_as_each_alone(study, prefill):
    study = study()
    needles = _needles(study, 5)
    assert len({len(needle.question) for needle in needles}) > 1  # several groups
    assert len({len(needle.question) for needle in needles}) < 5  # and several trials in one
    together = Reader(study, needles, prefill)
    dense = together.logits(("dense", None, 0))
    for cell in [("dense", None, 0), *cells_of((16, 128), "en", ("phsa", "infllm_v2", "moba"), (1,))]:
        logits = together.logits(cell)
        for i, needle in enumerate(needles):
            alone = Reader(study, [needle], prefill).logits(cell)[0]
            torch.testing.assert_close(logits[i], alone, rtol=1e-3, atol=1e-3)
        if cell[0] != "dense":
            assert not torch.allclose(logits, dense, atol=1e-1)


def test_a_reader_counts_the_right_digits_of_each_trial_in_order(study, monkeypatch):
    study = study()
    needles = _needles(study, 5)

    def perfect_but_for_depth(model, tokens, before, attend):
        answers = torch.nn.functional.one_hot(tokens[:, -7:], 257).float()
        for i, row in enumerate(tokens.tolist()):
            wrong = next(n for n, needle in enumerate(needles) if needle.question == row)
            answers[i, :wrong] = 0.0  # token 0 is no digit
        return answers

    monkeypatch.setattr(needle_study, "answer_logits", perfect_but_for_depth)
    assert Reader(study, needles, "dense").digits(("dense", None, 0)) == [7, 6, 5, 4, 3]


def _run(model, out, *more):
    arguments = ["--model", str(model), "--out", str(out), "--texts", "prose", "--dtype", "float32"]
    arguments += ["--tokens", str(TOKENS), "--trials", "4", "--batch", "2", "--topk", "1", "2"]
    return main(["needles", *arguments, "--selectors", *SMALL, *more])


def test_a_stopped_study_goes_on_and_its_cells_do_not_depend_on_that(study, byte_llama, tmp_path, capsys):
    _run(byte_llama, tmp_path / "whole")
    whole = read_cells(tmp_path / "whole" / "needles.jsonl")
    assert [(c["selector"], c["topk"], c["first_trial"]) for c in whole] == [
        (s, k, first) for first in (0, 2) for s, k in (("phsa", 1), ("phsa", 2), ("window", 0))
    ]
    assert all(len(c["num_digits"]) == 2 and c["num_tokens"] == TOKENS for c in whole)
    _run(byte_llama, tmp_path / "late", "--deadline-s", "-1")
    assert "goes on from here" in capsys.readouterr().out
    assert read_cells(tmp_path / "late" / "needles.jsonl") == []
    file = tmp_path / "late" / "needles.jsonl"
    file.write_text("".join(json.dumps(cell) + "\n" for cell in whole[:4]))
    _run(byte_llama, tmp_path / "late")
    assert read_cells(file) == whole
    with pytest.raises(DataError, match="one folder has one dtype"):
        _run(byte_llama, tmp_path / "late", "--dtype", "bfloat16")


def test_check_says_what_a_dtype_changes(study, byte_llama, tmp_path):
    arguments = ["--model", str(byte_llama), "--out", str(tmp_path), "--texts", "prose", "--topk", "1"]
    main(["check", *arguments, "--tokens", str(TOKENS), "--trials", "2", "--selectors", "phsa"])
    records = json.loads((tmp_path / "check_dense.json").read_text())
    assert [(r["dtype"], r["selector"]) for r in records] == [
        (dtype, s) for dtype in ("float32", "bfloat16") for s in ("dense", "phsa")
    ]
    assert all(r["max_logit_difference"] == 0 for r in records[:2])
    assert all(r["max_logit_difference"] > 0 for r in records[2:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_gpu_answers_as_the_cpu_does_with_every_selector(study, prefill):
    on_cpu, on_gpu = study("cpu"), study("cuda")
    needles = _needles(on_cpu, 6)
    readers = [Reader(where, needles, prefill) for where in (on_cpu, on_gpu)]
    cells = [("dense", None, 0), *cells_of((16, 128), "en", SELECTORS, (1, 4))]
    for cell in cells:
        cpu, gpu = (reader.logits(cell) for reader in readers)
        # A near tie of two blocks may fall either way and moves one trial's answer: one of six may differ.
        differs = ((cpu - gpu).abs() > 2e-3 + 2e-3 * cpu.abs()).flatten(1).any(1)
        assert differs.sum() <= 1, cell
