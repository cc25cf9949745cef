from __future__ import annotations

import math
from collections import Counter

import pytest

from phsa_megatron.data.batches import BatchReader
from phsa_megatron.training import baselines
from phsa_megatron.training.baselines import measure_baselines


@pytest.fixture
def readers(tiny_config):
    config = tiny_config()
    return BatchReader(config, "train"), BatchReader(config, "valid")


def _pairs(reader, count):
    batch = reader.micro_batch(0, count)
    counted = batch.loss_mask > 0
    return list(zip(batch.tokens[counted].tolist(), batch.labels[counted].tolist(), strict=True))


def test_equal_to_counting_by_hand(readers):
    train, valid = readers
    vocab = train.order.tokenizer.vocab_size
    seen = _pairs(train, 10)
    unigram = Counter(label for _, label in seen)
    after = Counter(token for token, _ in seen)
    bigram = Counter(seen)
    kinds = Counter(token for token, _ in bigram)

    def p_unigram(label):
        return (unigram[label] + 1) / (len(seen) + vocab)

    def p_bigram(token, label):
        t = max(kinds[token], 1)
        return (bigram[token, label] + t * p_unigram(label)) / (after[token] + t)

    wanted = _pairs(valid, valid.num_sequences)
    found = measure_baselines(train, valid, 10)
    assert found.unigram_entropy_nats == pytest.approx(
        -sum(math.log(p_unigram(b)) for _, b in wanted) / len(wanted)
    )
    assert found.bigram_entropy_nats == pytest.approx(
        -sum(math.log(p_bigram(a, b)) for a, b in wanted) / len(wanted)
    )
    for token in {a for a, _ in wanted}:  # both are distributions
        assert sum(p_bigram(token, b) for b in range(vocab)) == pytest.approx(1.0)


def test_counting_stops_at_the_limit(readers, monkeypatch):
    train, valid = readers
    monkeypatch.setattr(baselines, "MAX_TOKENS", 5 * 64)
    assert measure_baselines(train, valid, 1000) == measure_baselines(train, valid, 5)
    assert measure_baselines(train, valid, 4) != measure_baselines(train, valid, 5)
