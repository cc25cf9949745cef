import json
import random

import numpy as np
import pytest

from phsa_megatron.config.errors import TrainingError
from phsa_megatron.evaluation import plots
from phsa_megatron.evaluation.claim_study.page import ALL_NEEDLES, ENGLISH, read_records, write_page
from phsa_megatron.evaluation.claim_study.retrieval import DEPTHS, LANGUAGES, TASKS
from phsa_megatron.evaluation.claim_study.units import TOPKS
from phsa_megatron.evaluation.claim_study.verdicts import Question, difference, own_view, seed_limit

DOMAINS = ("chinese_prose", "english_prose", "retrieval_english")


def made_view(rng, loss, found):
    cells = [
        {"task": task, "language": language, "length_tokens": length, "depth_frac": depth}
        | {"hits": [int(rng.random() < found) for _ in range(4)], "nats": [9 * (1 - found)] * 4}
        for task in TASKS
        for language in LANGUAGES
        for length in (256, 512)
        for depth in DEPTHS
    ]
    sequences = [[512 * (loss + rng.gauss(0, 0.3)), 512.0] for _ in range(8)]
    mass = dict.fromkeys(("window_mass_frac", "kept_mass_frac", "oracle_mass_frac", "oracle_gain_frac"), 0.8)
    return {
        "nats_and_tokens_by_sequence": dict.fromkeys(DOMAINS, sequences),
        "nats_and_tokens_by_position": {d: [[loss * 100, 100.0]] * 2 + [[0.0, 0.0]] * 4 for d in DOMAINS},
        "needles": cells,
        "mass": {d: mass | {"oracle_gain_frac": None} for d in DOMAINS},
    }


def made_record(variant, seed, loss, found=0.5, topk=2):
    # The same questions for all: only what is added to them differs.
    rng = random.Random(seed)
    kind = "dense" if variant == "dense" else "phsa"
    views = {f"k{k}": made_view(rng, loss - 0.01 * k, found) for k in TOPKS}
    if kind == "dense":
        views = {f"phsa/{name}": view for name, view in views.items()}
    return {
        "variant": variant,
        "about": f"about {variant}",
        "seed": seed,
        "settings": {
            "attention.kind": kind,
            "attention.train_topk": topk,
            "data.seq_len_tokens": 512,
            "optim.global_batch_sequences": 2,
            "attention.init_tokens": 16,
            "attention.local_tokens": 64,
            "attention.block_tokens": 16,
        },
        "measures": {"trials": 4},
        "parameters": 1000,
        "commit": "0123456789abcdef",
        "steps": 4,
        "tokens": 4096,
        "flops": 1e9,
        "sparsity_last_token_frac": 0.9,
        "device": "a device",
        "first_weights_sha256": f"weights {seed}",
        "data_fingerprint": f"data {seed}",
        "seconds": {"open": 1.0, "train": 10.0, "evaluate": 5.0},
        "views": views | {"dense": made_view(rng, loss - 0.2, found)},
    }


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    losses = {"mean_pool": 3.0, "phsa_en_zh": 2.9, "dense": 2.6, "phsa_en_zh_k4": 2.8, "random_tokens": 2.9}
    for seed in (0, 1, 2):
        for name, loss in losses.items():
            noise = 0.001 * seed * (name == "phsa_en_zh")
            record = made_record(name, seed, loss + noise, topk=4 if name.endswith("k4") else 2)
            (folder / f"{name}-seed{seed}.json").write_text(json.dumps(record))
    return folder


def test_the_page_says_what_the_numbers_say(units, tmp_path):
    said = write_page(units, tmp_path / "claim")
    text = (tmp_path / "claim.md").read_text()
    assert "from 15 units" in said
    lines = text.splitlines()
    (question,) = [n for n, line in enumerate(lines) if "Does punctuation beat the plain mean?" in line]
    assert "-0.0990 nats/token" in lines[question + 1] and "**better**" in lines[question + 1]
    (question,) = [n for n, line in enumerate(lines) if "How far is it from dense?" in line]
    # The dense view has 0.2 less, and 0.02 of k = 2 is not in it.
    assert "**worse**" in lines[question + 1]
    (question,) = [n for n, line in enumerate(lines) if "Does it beat random tokens?" in line]
    assert "**no difference is shown**" in lines[question + 1]
    (row,) = [line for line in lines if line.startswith("| mean_pool | loss, English |")]
    assert row.count("(better)") == 5
    assert "| trained with | chinese_prose | english_prose | retrieval_english |" in text
    assert "Not measured: phsa_en_zh and infllm_v2 are not both there." in text
    assert "Not trained: phsa, infllm_v2, halves, phsa_en_zh_k1." in text
    assert "| phsa_en_zh_k4 | 4 | 3 |" in text
    for name in ("english", "chinese", "needles"):
        assert (tmp_path / f"claim_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_can_be_made_again_from_what_it_left(units, tmp_path):
    write_page(units, tmp_path / "claim")
    first = (tmp_path / "claim.md").read_text()
    write_page(tmp_path / "claim_units.jsonl.xz", tmp_path / "claim")
    assert (tmp_path / "claim.md").read_text() == first


@pytest.mark.parametrize("key", ["first_weights_sha256", "data_fingerprint"])
def test_units_that_do_not_belong_together_are_refused(key, tmp_path):
    for name, value in (("mean_pool", "x"), ("phsa", "y")):
        record = made_record(name, 0, 3.0) | {key: value}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match=f"seed 0: units differ in {key}"):
        read_records(tmp_path)


@pytest.mark.parametrize("key", ["tokens", "measures"])
def test_seeds_of_other_sizes_are_refused(key, tmp_path):
    for seed in (0, 1):
        record = made_record("phsa", seed, 3.0) | {key: seed}
        (tmp_path / f"phsa-seed{seed}.json").write_text(json.dumps(record))
    with pytest.raises(TrainingError, match=f"units differ in {key}"):
        read_records(tmp_path)


def test_incomplete_seeds_are_compared_inside_a_seed_and_drawn_alike(tmp_path, monkeypatch):
    """Differences of two variants move by 0.02 from seed to seed; phsa is 0.03 better, in one seed."""
    losses = {"mean_pool": (3.0, 4.0), "phsa_en_zh": (2.5, 3.52), "phsa": (2.97,), "random_tokens": (2.0,)}
    (tmp_path / "units").mkdir()
    for name, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            record = made_record(name, seed, loss) | {"device": "card A" if seed else "card B"}
            (tmp_path / "units" / f"{name}-seed{seed}.json").write_text(json.dumps(record))
    drawn = {}
    monkeypatch.setattr(plots, "curves", lambda path, series, **_: drawn.update({path.name: series}))
    write_page(tmp_path / "units", tmp_path / "claim")
    text = (tmp_path / "claim.md").read_text()
    assert "on card A and card B" in text and "Not all rows are of the same seeds" in text
    assert "the mean of the seeds that all variants have (0)" in text
    lines = text.splitlines()

    def loss_line(words):
        (place,) = [n for n, line in enumerate(lines) if words in line]
        return lines[place + 1]

    # One degree of freedom: 12.706 times the deviation 0.0141 is 0.1797, over sqrt(2) seeds 0.1271.
    assert "-0.4900 nats/token (-0.6171 to -0.3629; " in loss_line("beat the plain mean?")
    assert "**better**" in loss_line("beat the plain mean?")
    assert "makes up to 0.1797" in loss_line("English punctuation alone")
    assert "**no more than another seed may do**" in loss_line("English punctuation alone")
    assert "**worse in this one seed**" in loss_line("beat random tokens?")
    # At k = 2; the second seed of the other variants is not in it.
    by_k = {name: points[2] for name, points in drawn["claim_english.png"].items()}
    first = {name: made_record(name, 0, by_seed[0]) for name, by_seed in losses.items()}
    assert by_k == pytest.approx({name: ENGLISH.value(record, "k2") for name, record in first.items()})


def test_nothing_is_known_of_seeds_without_two_of_them():
    alone = {"a": [made_record("a", 0, 3.0)], "b": [made_record("b", 0, 2.0), made_record("b", 1, 2.0)]}
    assert seed_limit(ENGLISH, alone) is None


def test_differences_by_seeds_alone_stay_below_their_limit_as_often_as_it_says():
    generator = np.random.default_rng(2)
    question = Question("q", True, lambda record, view: np.array([[record["x"], 1.0]]), "u")
    settings = {"attention.kind": "dense"}
    below = 0
    for _ in range(1000):
        made = {
            name: [{"seed": s, "x": x, "settings": settings} for s, x in enumerate(generator.normal(size=2))]
            for name in "abc"
        }
        below += abs(generator.normal() - generator.normal()) <= seed_limit(question, made)
    # 950 expected; the standard deviation of the count is 6.9.
    assert 922 <= below <= 978


def test_no_record_is_said(tmp_path):
    with pytest.raises(TrainingError, match="holds no record"):
        read_records(tmp_path)


def test_one_seed_has_the_noise_of_questions_only():
    ours, theirs = made_record("a", 0, 2.9), made_record("b", 0, 3.0)
    found = difference(ENGLISH, [(ours, "k2")], [(theirs, "k2")])
    assert found.num_seeds == 1 and "training noise is not in it" in found.evidence
    assert found.low <= found.mean <= found.high < 0 and found.verdict == "better in this one seed"
    # Pairs: the spread between sequences, 0.3, is in both and falls out.
    assert found.high - found.low < 1e-6 and found.mean == pytest.approx(-0.1)


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    generator = np.random.default_rng(1)
    question = Question("q", True, lambda record, view: np.array([[record["x"], 1.0]]), "u")
    inside = 0
    for _ in range(1000):
        a, b = ([({"seed": s, "x": x}, "k2") for s, x in enumerate(generator.normal(size=3))] for _ in "ab")
        inside += difference(question, a, b).verdict == "no difference is shown"
    # 950 expected; the standard deviation of the count is 6.9.
    assert 922 <= inside <= 978


@pytest.mark.parametrize(("found", "words"), [(0.0, "neither finds"), (1.0, "both find"), (0.5, "no diff")])
def test_needles_that_nobody_or_everybody_finds_say_nothing(found, words):
    a, b = ([(made_record(name, seed, 3.0, found), "k2") for seed in (0, 1)] for name in "ab")
    assert words in difference(ALL_NEEDLES, a, b).verdict


def test_own_view_is_that_of_training():
    assert own_view(made_record("dense", 0, 1.0)) == "dense"
    assert own_view(made_record("phsa_en_zh_k4", 0, 1.0, topk=4)) == "k4"
