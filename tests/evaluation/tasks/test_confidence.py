import math

import numpy as np
import pytest

from phsa_megatron.evaluation.tasks.confidence import of_ratio, of_scores


def test_hits_get_wilsons_interval():
    found = of_scores([1.0] * 8 + [0.0] * 2)
    # By hand, z = 1.96: (0.8 + 0.19208) / 1.38416 -+ 1.96 / 1.38416 * sqrt(0.016 + 0.009604).
    assert found.method == "wilson" and found.mean == 0.8
    assert found.low == pytest.approx(0.4902, abs=2e-4) and found.high == pytest.approx(0.9433, abs=2e-4)


@pytest.mark.parametrize(("score", "low", "high"), [(0.0, 0.0, 0.2775), (1.0, 0.7225, 1.0)])
def test_no_hit_and_only_hits_have_an_interval_too(score, low, high):
    found = of_scores([score] * 10)
    assert (found.low, found.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_other_scores_get_a_seeded_bootstrap_of_the_right_width():
    scores = list(np.random.default_rng(0).random(200))
    found = of_scores(scores, seed=3)
    assert found.method == "bootstrap" and found == of_scores(scores, seed=3)
    half = 1.96 * np.std(scores) / math.sqrt(200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)


def test_a_single_score_between_has_no_interval():
    assert math.isnan(of_scores([0.5]).low)


def test_a_ratio_weighs_documents_by_their_tokens():
    assert of_ratio([10.0, 90.0], [10.0, 30.0]).mean == 2.5
