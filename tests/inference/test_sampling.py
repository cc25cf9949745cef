import pytest
import torch

from phsa_megatron.inference.sampling import Sampling, choose_tokens

LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()


def draw(sampling, points):
    """Tokens of the first row at these places of the unit interval."""
    uniforms = torch.tensor(points, dtype=torch.float64)
    return choose_tokens(LOGITS[:1].expand(len(points), -1), sampling, uniforms).tolist()


def test_greedy_takes_the_lowest_of_the_most_likely():
    assert choose_tokens(LOGITS, Sampling(), None).tolist() == [1, 0]


def test_each_token_has_its_share_of_the_unit_interval():
    # In order of probability: 1 (0.4), 3 (0.3), 2 (0.2), 0 (0.1).
    points = [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.999999999999]
    assert draw(Sampling(1.0), points) == [1, 1, 3, 3, 2, 2, 0, 0]


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    points = [0.0, 0.56, 0.58, 0.9999999]
    assert draw(Sampling(1.0, top_p=0.7 - 1e-6), points) == [1, 1, 3, 3]  # 0.4 / 0.7 = 0.571
    assert draw(Sampling(1.0, top_p=0.7 + 1e-6), [0.9999999]) == [2]
    assert draw(Sampling(1.0, top_p=1e-9), points) == [1, 1, 1, 1]


def test_temperature_sharpens():
    counts = [draw(Sampling(t), [i / 100 for i in range(100)]).count(1) for t in (0.5, 1.0, 5.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] == 54  # 0.16 / 0.30: 0.533


def test_prompts_and_seeds_have_streams_of_their_own():
    def first(seed, number):
        return float(torch.rand(1, dtype=torch.float64, generator=Sampling(seed=seed).random_numbers(number)))

    values = {(seed, number): first(seed, number) for seed in range(4) for number in range(4)}
    assert len(set(values.values())) == 16
    assert first(2, 3) == values[2, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
