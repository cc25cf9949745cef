from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.sampling import (
    CYCLE,
    DocumentStream,
    TrainingOrder,
    ValidationOrder,
    WeightedSource,
    permutation,
)

S = 16
RECORDED = [("b", 6, 30), ("b", 4, 48), ("b", 4, 64), ("b", 4, 16), ("b", 4, 0), ("a", 4, 32)]


@dataclass
class Documents:
    """Stands in for an opened set: the order only asks for lengths."""

    sizes: list[int]
    prefix: str = "some/prefix"
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)


def order(weights: dict[str, float], seed: int = 1, sizes: tuple[int, ...] = (5, 40, 17, 3, 90, 1, 33)):
    sources = {n: WeightedSource(Documents(list(sizes)), w, f"domain_{n}") for n, w in weights.items()}
    return TrainingOrder(sources, S, seed)


def test_a_permutation_is_a_fixed_function_of_its_key():
    # Recorded: another numpy or another machine must give the same order, or no run could be resumed on it.
    assert permutation(8, "documents", 1, "en", 0).tolist() == [3, 0, 7, 5, 1, 4, 6, 2]
    assert sorted(permutation(1000, "x").tolist()) == list(range(1000))
    assert permutation(1000, "x").tolist() != permutation(1000, "y").tolist()


def test_the_order_is_the_recorded_one():
    sequences = [order({"a": 1.0, "b": 3.0}, seed=7).sequence(n) for n in range(6)]
    found = [(s.source, s.pieces[0].document, s.pieces[0].first_token) for s in sequences]
    assert found == RECORDED, "the order changed: runs in progress could not be resumed; raise ALGORITHM"


def test_any_sequence_can_be_read_first():
    forwards = order({"a": 1.0, "b": 3.0})
    numbers = [*range(60), CYCLE - 1, CYCLE, 5 * CYCLE + 3, 5000 * CYCLE + 17]
    expected = {n: forwards.sequence(n) for n in numbers}
    for n in reversed(numbers):
        assert order({"a": 1.0, "b": 3.0}).sequence(n) == expected[n]


def test_another_seed_is_another_order_and_another_order_of_names_is_not():
    numbers = range(200)
    first = [order({"a": 1.0, "b": 3.0}).sequence(n) for n in numbers]
    assert [order({"a": 1.0, "b": 3.0}, seed=2).sequence(n) for n in numbers] != first
    assert [order({"b": 3.0, "a": 1.0}).sequence(n) for n in numbers] == first


def test_weights_are_relative():
    numbers = range(200)
    assert [order({"a": 1.0, "b": 3.0}).sequence(n) for n in numbers] == [
        order({"a": 2.0, "b": 6.0}).sequence(n) for n in numbers
    ]


@pytest.mark.parametrize(
    "weights", [{"a": 1.0}, {"a": 1.0, "b": 3.0}, {"a": 5.0, "b": 0.001, "c": 1.7, "d": 0.3}]
)
def test_the_mixture_keeps_its_shares_at_every_length(weights):
    mixed = order(weights)
    counts: Counter[str] = Counter()
    total = sum(weights.values())
    for n in range(12 * CYCLE):
        counts[mixed.sequence(n).source] += 1
        if (n + 1) % CYCLE == 0:
            # The offset walks by the golden ratio: the error of a running count stays a few sequences.
            for name, weight in weights.items():
                assert abs(counts[name] - (n + 1) * weight / total) < 4, (n, name)


def test_running_counts_far_away_equal_the_sum_of_all_cycles_before():
    mixed = order({"a": 5.0, "b": 0.001, "c": 1.7})
    cycle = 3 * 4096 + 5
    before, after = mixed._block(3)[5:7]
    assert np.array_equal(before, mixed._counts(0, cycle).sum(axis=0))
    assert before.sum() == cycle * CYCLE
    assert (after - before).sum() == CYCLE
    assert (mixed._counts(0, cycle) >= 0).all()


def test_each_token_is_an_input_once_an_epoch_except_for_the_tail():
    sizes = (5, 40, 17, 3, 90, 1, 33)
    mixed = order({"a": 1.0}, sizes=sizes)
    per_epoch = mixed.epoch_sequences("a")
    assert per_epoch == (sum(sizes) - 1) // S
    tails = []
    for epoch in range(8):
        seen: Counter[tuple[int, int]] = Counter()
        for n in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            tokens = [
                (p.document, p.first_token + i) for p in mixed.sequence(n).pieces for i in range(p.num_tokens)
            ]
            assert len(tokens) == S + 1
            seen.update(tokens[:S])
        assert set(seen.values()) == {1}
        every = {(d, i) for d, size in enumerate(sizes) for i in range(size)}
        assert len(every - set(seen)) == sum(sizes) - per_epoch * S <= S
        tails.append(every - set(seen))
    assert any(tail != tails[0] for tail in tails), "the same text would never be trained on"


def test_pieces_equal_a_walk_through_the_concatenated_documents():
    lengths = np.array([3, 1, 7, 2, 9], dtype=np.int32)
    visit = np.array([4, 0, 3, 1, 2])
    stream = DocumentStream(lengths, visit)
    walk = [(int(d), i) for d in visit for i in range(lengths[d])]
    for first in range(len(walk)):
        for count in range(1, len(walk) + 3):
            pieces = stream.pieces(first, count)
            found = [(p.document, p.first_token + i) for p in pieces for i in range(p.num_tokens)]
            assert found == walk[first : first + count]


def test_a_source_that_is_too_short_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"data\.sources\.a .*has 16 tokens.*seq_len_tokens \+ 1 = 17"):
        order({"a": 1.0}, sizes=(10, 6))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight"):
        order({"a": 1.0, "b": weight})


def test_no_source_is_refused():
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        order({})


def validation(num_per_domain: int) -> ValidationOrder:
    sources = {
        "x1": (Documents([20, 20]), "x"),
        "x2": (Documents([100]), "x"),
        "y": (Documents([9]), "y"),
    }
    return ValidationOrder(sources, S, num_per_domain)


def test_validation_takes_the_first_sequences_of_each_source_in_turn():
    fixed = validation(5)
    assert fixed.num_sequences == 10
    found = [(s.source, s.pieces[0].document, s.pieces[0].first_token) for s in map(fixed.sequence, range(5))]
    assert found == [("x1", 0, 0), ("x2", 0, 0), ("x1", 0, 16), ("x2", 0, 16), ("x1", 1, 12)]


def test_validation_never_repeats_a_token_and_empties_what_is_missing():
    fixed = validation(50)
    labels: Counter[tuple[str, int, int]] = Counter()
    for number in range(fixed.num_sequences):
        sequence = fixed.sequence(number)
        assert sequence.domain == ("x" if number < 50 else "y")
        tokens = [
            (sequence.source, p.document, p.first_token + i)
            for p in sequence.pieces
            for i in range(p.num_tokens)
        ]
        labels.update(tokens[1:])
    assert set(labels.values()) == {1}
    # All tokens but the first of each of the three sources are a label.
    assert len(labels) == 40 + 100 + 9 - 3
    assert fixed.sequence(99).pieces == ()


def test_a_longer_validation_starts_with_the_shorter_one():
    assert [validation(3).sequence(n) for n in range(3)] == [validation(5).sequence(n) for n in range(3)]
