"""Trials that are read together are answered as each by itself; a study goes on where it stopped."""

import argparse
import json

import pytest
import torch

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation import needle_blocks, needle_study, study_setup
from phsa_megatron.evaluation.needle_study import Reader
from phsa_megatron.evaluation.needles import make_needle
from phsa_megatron.evaluation.probe_attention import SELECTORS, settings_of
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


def test_another_lambda_is_measured_when_it_is_asked_for(byte_llama, tmp_path):
    _run(byte_llama, tmp_path, "--selectors", "phsa", "phsa@0", "phsa@0.75")
    cells = read_cells(tmp_path / "needles.jsonl")
    assert {c["selector"] for c in cells} == {"phsa", "phsa@0", "phsa@0.75"}
    assert settings_of("phsa@0.75", 16, 128).mean_weight_frac == 0.75
    assert settings_of("random_tokens@0", 16, 128).selector == "random_tokens"


def test_blocks_says_whether_the_digits_blocks_have_punctuation(byte_llama, study, tmp_path, monkeypatch):
    monkeypatch.setattr(needle_blocks, "text_of", lambda name, essays: "no sign in it " * 90)
    arguments = ["--model", str(byte_llama), "--out", str(tmp_path), "--texts", "prose", "--trials", "5"]
    assert main(["blocks", *arguments, "--tokens", str(TOKENS)]) == 0
    (record,) = json.loads((tmp_path / "blocks.json").read_text())
    assert record["blocks_with_punctuation_frac"] == 0 and record["punctuation_per_block"] == 0
    shares = record["digit_blocks_with_punctuation_frac"]
    study = study()
    ids = study.tokenizer.encode("no sign in it " * 90, add_special_tokens=False).ids
    for trial, share in enumerate(shares):
        needle = make_needle(study.tokenizer, ids, TOKENS, trial)
        blocks = needle_blocks.digit_blocks(needle, 16)
        text = study.tokenizer.decode(needle.prefix[blocks.start * 16 : blocks.stop * 16])
        assert study.tokenizer.decode(needle.digits) in text
        # The only signs near the number are those of its own sentence.
        signs = [any(sign in text[i : i + 16] for sign in ".\n") for i in range(0, len(text), 16)]
        assert share == sum(signs) / len(signs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_gpu_answers_as_the_cpu_does_with_every_selector(study, prefill):
    on_cpu, on_gpu = study("cpu"), study("cuda")
    needles = _needles(on_cpu, 6)
    readers = [Reader(where, needles, prefill) for where in (on_cpu, on_gpu)]
    # Equal tokens of a block have equal norms in the first layer, where rounding then decides for max_norm:
    # a relative change of 6e-8 moves all six trials. Every other selector is moved by less than 2e-4 then.
    names = [name for name in SELECTORS if name != "max_norm"]
    cells = [("dense", None, 0), *cells_of((16, 128), "en", names, (1, 4))]
    found = {}
    for cell in cells:
        cpu, gpu = (reader.logits(cell) for reader in readers)
        # A near tie of two blocks may fall either way and moves one trial's answer: one of six may differ.
        differs = ((cpu - gpu).abs() > 2e-3 + 2e-3 * cpu.abs()).flatten(1).any(1)
        if differs.sum() > 1:
            found[cell[0], cell[2]] = int(differs.sum()), float((cpu - gpu).abs().max())
    assert not found
