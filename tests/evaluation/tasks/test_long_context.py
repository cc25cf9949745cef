"""A program that knows the rules solves the tasks from the prompt alone; a wrong answer gets nothing."""

import re
from collections import Counter

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.long_context import (
    HAS_DEPTH,
    LONG_TASKS,
    NUM_COMMON,
    Sample,
    make_sample,
)


def by_words(text):
    """A tokenizer without surprises, fast enough for 128k tokens: every word and every mark is one."""
    return re.findall(r" ?\w+|\W", text)


def solve(task, prompt):
    """Return the answer, from the prompt alone."""
    text, _, question = prompt.rpartition("Question:")
    if task in ("needle", "multi_key", "multi_value"):
        name = re.search(r"of ([a-z]+-[a-z]+)\?", question).group(1)
        return " and ".join(re.findall(rf"code of {name} is (\d+)", text))
    if task == "variables":
        values = {}
        for name, value, source in re.findall(r"Let (\w+) be (?:(\d+)|equal to (\w+))\.", text):
            values[name] = value or values[source]
        wanted = re.search(r"value (\d+)\?", question).group(1)
        return ", ".join(name for name, value in values.items() if value == wanted)
    counts = Counter(re.findall(r"[a-z]+(?:-[a-z]+)?", text.split("\n\n")[1]))
    return ", ".join(word for word, _ in counts.most_common(NUM_COMMON))


@pytest.mark.parametrize("task", LONG_TASKS)
@pytest.mark.parametrize("length", [1024, 8192])
def test_a_perfect_answerer_gets_one_and_a_wrong_one_nothing(task, length, backend):
    def encode(text):
        return backend.encode(text, add_special_tokens=False).ids

    for trial in range(3):
        sample = make_sample(task, encode, length, seed=1, trial=trial)
        answer = solve(task, sample.prompt)
        assert sample.score(answer) == 1.0
        assert len(encode(" " + answer)) <= sample.max_new_tokens
        other = make_sample(task, encode, length, seed=2, trial=trial)
        wrong = set(other.expected) - set(sample.expected)
        assert sample.score(" ".join(wrong)) == 0.0
        assert sample.score("") == 0.0
        assert len(encode(sample.prompt)) + sample.max_new_tokens == length == sample.num_tokens


@pytest.mark.parametrize("task", LONG_TASKS)
def test_128k_is_met_to_the_token(task):
    sample = make_sample(task, by_words, 131_072, seed=1, trial=1, depth_frac=0.5)
    assert len(by_words(sample.prompt)) + sample.max_new_tokens == 131_072
    assert sample.score(solve(task, sample.prompt)) == 1.0


def test_a_part_of_the_answer_gets_its_share():
    sample = make_sample("multi_value", by_words, 1024, seed=1, trial=1)
    assert sample.score(" and ".join(sample.expected[1:])) == 0.75


def test_parts_of_words_and_numbers_do_not_count():
    sample = Sample("needle", "", ("1234567",), 8, 64, 0.5, 1, 1)
    assert sample.score("It is 1234567.") == 1.0
    assert sample.score("12345678") == sample.score("01234567") == 0.0
    sample = Sample("common_words", "", ("canoe",), 8, 64, None, 1, 1)
    assert sample.score("Canoe, owl") == 1.0
    assert sample.score("amber-canoe, canoes") == 0.0


@pytest.mark.parametrize("task", LONG_TASKS)
def test_samples_are_functions_of_seed_and_trial(task):
    def make(**changes):
        return make_sample(task, by_words, 1024, **{"seed": 1, "trial": 1, **changes})

    assert make() == make()
    assert len({make(seed=seed, trial=trial).expected for seed in (1, 2) for trial in (1, 2)}) == 4


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_is_where_it_was_asked_for(depth):
    sample = make_sample("needle", by_words, 4096, seed=1, trial=1, depth_frac=depth)
    before = by_words(sample.prompt[: sample.prompt.index("The code of")])
    # A sentence and the words of the frame are up to 3% of this prompt.
    assert len(before) / len(by_words(sample.prompt)) == pytest.approx(depth, abs=0.03)
    assert "needle" in HAS_DEPTH


def test_a_haystack_of_ones_own_takes_the_place_of_made_sentences():
    haystack = [f"Sentence number {word} of a book." for word in ("one", "two", "three")]
    sample = make_sample("needle", by_words, 600, seed=1, trial=1, haystack=haystack)
    body = sample.prompt.split("\n\n")[1]
    found = re.findall(r"number (\w+) of a book", body)
    assert len(found) > 30
    following = {"one": "two", "two": "three", "three": "one"}
    assert all(following[a] == b for a, b in zip(found, found[1:], strict=False))
    assert sample.score(solve("needle", sample.prompt)) == 1.0


def test_common_words_are_far_more_frequent_than_others():
    sample = make_sample("common_words", by_words, 16_384, seed=1, trial=1)
    counts = Counter(re.findall(r"[a-z]+(?:-[a-z]+)?", sample.prompt.split("\n\n")[1]))
    common = {counts[word] for word in sample.expected}
    others = max(count for word, count in counts.items() if word not in sample.expected)
    assert len(common) == 1 and min(common) >= 5 * others


@pytest.mark.parametrize("task", LONG_TASKS)
def test_a_length_without_room_is_refused(task):
    with pytest.raises(ConfigError, match=rf"{task}: without any filler.*use larger lengths"):
        make_sample(task, by_words, 60, seed=1, trial=1)
