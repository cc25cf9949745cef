from __future__ import annotations

import math
from collections import Counter

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.order import SequenceOrder
from phsa_megatron.data.unigram import BIGRAM_PRIOR, measure_baseline


@pytest.mark.parametrize("chunk", [1, 50, 1 << 24])
def test_both_losses_equal_the_formulas_counted_token_by_token(mixture, monkeypatch, chunk):
    monkeypatch.setattr("phsa_megatron.data.unigram._CHUNK_TOKENS", chunk)
    config = mixture()
    order = SequenceOrder(config, "train")
    vocab_size = order.tokenizer.vocab_size
    sources = {name: order.source(name) for name in order.source_names()}
    num_tokens = sum(source.num_tokens for source in sources.values())
    ones: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    before: Counter[int] = Counter()
    for name, source in sources.items():
        scale = {"big": 0.75, "small": 0.25}[name] * num_tokens / source.num_tokens
        for document in range(len(source)):
            ids = source.tokens(document).tolist()
            for token in ids:
                ones[token] += scale
            for a, b in zip(ids, ids[1:], strict=False):
                pairs[a, b] += scale
                before[a] += scale
    total = sum(ones.values())

    def p1(token: int) -> float:
        return (ones[token] + 1) / (total + vocab_size)

    def p2(a: int, b: int) -> float:
        return (pairs[a, b] + BIGRAM_PRIOR * p1(b)) / (before[a] + BIGRAM_PRIOR)

    reader = BatchReader(config, "valid")
    batch = reader.micro_batch(0, reader.num_sequences)
    by_domain: dict[str, list[tuple[int, int]]] = {}
    for row, domain in enumerate(batch.domains):
        for a, b, counts in zip(batch.tokens[row], batch.labels[row], batch.loss_mask[row], strict=True):
            if counts:
                by_domain.setdefault(domain, []).append((int(a), int(b)))
    found = measure_baseline(config)
    assert sum(p1(t) for t in range(vocab_size)) == pytest.approx(1.0)
    num_bytes = reader.order.tokenizer.token_num_bytes()
    every = [pair for pairs_ in by_domain.values() for pair in pairs_]
    for targets, measured in [
        (every, found.overall),
        *((by_domain[d], found.by_domain[d]) for d in by_domain),
    ]:
        assert measured.num_targets == len(targets)
        assert measured.unigram_nats == pytest.approx(
            -sum(math.log(p1(b)) for _, b in targets) / len(targets)
        )
        assert measured.bigram_nats == pytest.approx(
            -sum(math.log(p2(a, b)) for a, b in targets) / len(targets)
        )
        assert measured.num_bytes == sum(num_bytes[b] for _, b in targets)
        nats = measured.unigram_nats * measured.num_targets
        assert measured.unigram_bits_per_byte == pytest.approx(nats / math.log(2) / measured.num_bytes)


def test_a_bigram_knows_more_than_a_unigram_and_less_than_everything(mixture):
    found = measure_baseline(mixture())
    assert 0 < found.overall.bigram_nats < found.overall.unigram_nats < math.log(300)


def test_a_validation_without_targets_is_refused(mixture):
    config = mixture()
    config.evaluate.num_sequences_per_domain = 0
    with pytest.raises(DataError, match="hold no target token"):
        measure_baseline(config)
