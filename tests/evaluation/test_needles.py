import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from phsa_megatron.evaluation.needles import DEPTHS, NUM_DIGITS, make_needle


@pytest.fixture
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_a_trial_asks_for_the_number_that_is_in_its_text(tokenizer):
    hay = tokenizer.encode("some words, and more of them. " * 60).ids
    for trial in range(10):
        needle = make_needle(tokenizer, hay, 900, trial)
        assert len(needle.prefix) + len(needle.question) == 900
        number = tokenizer.decode(needle.digits)
        assert len(number) == NUM_DIGITS and number.isdigit()
        text = tokenizer.decode(needle.prefix)
        assert text.count(number) == 1
        question = tokenizer.decode(needle.question)
        assert question.endswith(number) and question.count(number) == 1
        city = question.split(" for ")[1].split("?")[0]
        assert f"The magic number for {city} is {number}." in text
        assert needle.depth_frac == DEPTHS[trial % 5]
        place = text.index(number) / len(text)
        assert abs(place - needle.depth_frac) < 0.15  # the instruction stands before the haystack


def test_trials_are_repeatable_and_differ(tokenizer):
    hay = tokenizer.encode("some words, and more of them. " * 60).ids
    assert make_needle(tokenizer, hay, 900, 3) == make_needle(tokenizer, hay, 900, 3)
    numbers = {tuple(make_needle(tokenizer, hay, 900, trial).digits) for trial in range(20)}
    assert len(numbers) == 20


def test_a_short_haystack_is_refused(tokenizer):
    with pytest.raises(ValueError, match="room for"):
        make_needle(tokenizer, [1] * 100, 900, 0)
