from __future__ import annotations

import pytest
import torch

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.data.batches import Batch, BatchReader

S = 32


def equal(a: Batch, b: Batch) -> bool:
    names = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and (a.pieces, a.domains) == (
        b.pieces,
        b.domains,
    )


def brute_force(reader: BatchReader, number: int, isolate: bool, limit: int):
    """One sequence token by token: tokens, labels, mask, positions, starts, overflow."""
    sequence = reader.order.sequence(number)
    documents = reader.order.source(sequence.source) if sequence.pieces else None
    stream = []
    for index, piece in enumerate(sequence.pieces):
        whole = documents.tokens(piece.document).tolist()
        stream += [(index, whole[piece.first_token + i]) for i in range(piece.num_tokens)]
    pad = (None, reader.order.tokenizer.eod_id)
    stream += [pad] * (S + 1 - len(stream))
    overflow = 0
    if isolate:
        kinds = list(dict.fromkeys(owner for owner, _ in stream[:S]))
        if len(kinds) > limit:
            kept = set(kinds[: limit - 1])
            overflow = sum(owner is not None and owner not in kept for owner, _ in stream[:S])
            stream = [(o, t) if o in kept else pad for o, t in stream]
    mask, positions, starts = [], [], []
    for i in range(S):
        owner, following = stream[i][0], stream[i + 1][0]
        same = owner == following if isolate else True
        mask.append(float(owner is not None and following is not None and same))
        if i == 0 or (isolate and stream[i - 1][0] != owner):
            starts.append(i)
        positions.append(i - starts[-1])
    tokens = [token for _, token in stream]
    return tokens[:S], tokens[1:], mask, positions, starts, overflow


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("limit", [2, 3, 8])
def test_a_batch_equals_a_token_by_token_construction(mixture, split, isolate, limit):
    config = mixture()
    config.data.isolate_documents, config.data.max_documents_per_sequence = isolate, limit
    config.evaluate.num_sequences_per_domain = 30
    reader = BatchReader(config, split)
    first, count = 0, 60
    batch = reader.micro_batch(first, count)
    rows = [brute_force(reader, first + i, isolate, limit) for i in range(count)]
    assert batch.tokens.tolist() == [row[0] for row in rows]
    assert batch.labels.tolist() == [row[1] for row in rows]
    assert batch.loss_mask.tolist() == [row[2] for row in rows]
    assert batch.position_ids.tolist() == [row[3] for row in rows]
    boundaries = [i * S + start for i, row in enumerate(rows) for start in row[4]]
    size = count * limit + 1
    assert batch.cu_seqlens.tolist() == boundaries + [count * S] * (size - len(boundaries))
    assert batch.num_overflow_tokens == sum(row[5] for row in rows)
    if isolate and limit == 2:
        assert batch.num_overflow_tokens > 0, "the limit was never reached: this shows nothing"
    if split == "valid":
        assert (batch.loss_mask.sum(dim=1) == 0).any(), "no padded sequence: this shows nothing"


def test_dtypes_and_shapes_are_those_of_the_contract(mixture):
    batch = BatchReader(mixture(), "train").micro_batch(3, 2)
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32
    assert batch.cu_seqlens.dtype == torch.int32
    assert (
        batch.tokens.shape
        == batch.labels.shape
        == batch.loss_mask.shape
        == batch.position_ids.shape
        == (2, S)
    )
    assert batch.cu_seqlens.shape == (2 * 8 + 1,)
    assert len(batch.domains) == len(batch.pieces) == len(batch.sources) == 2


def test_no_label_that_counts_lies_in_another_document(mixture):
    reader = BatchReader(mixture(), "train")
    batch = reader.micro_batch(0, 100)
    ends = batch.tokens == reader.order.tokenizer.eod_id
    assert ends.any()
    assert batch.loss_mask[ends].sum() == 0
    assert (batch.labels[batch.loss_mask > 0] == reader.order.tokenizer.eod_id).any(), "ends are learned"


def test_the_same_numbers_give_the_same_batch_however_they_are_split_over_processes(mixture):
    whole = BatchReader(mixture(), "train").micro_batch(16, 8)
    for data_size, micro in ((1, 4), (2, 2), (4, 1), (8, 1)):
        rows: dict[int, Batch] = {}
        for rank in range(data_size):
            reader = BatchReader(mixture(), "train")
            for first in range(16 + rank * micro, 24, data_size * micro):
                part = reader.micro_batch(first, micro)
                rows |= {first + i: part for i in range(micro)}
                assert torch.equal(part.tokens, whole.tokens[first - 16 : first - 16 + micro])
                assert torch.equal(part.loss_mask, whole.loss_mask[first - 16 : first - 16 + micro])
        assert sorted(rows) == list(range(16, 24))


def test_reading_at_random_equals_reading_in_order(mixture):
    reader, fresh = BatchReader(mixture(), "train"), BatchReader(mixture(), "train")
    in_order = {n: reader.micro_batch(n, 2) for n in range(50)}
    for n in (49, 0, 17, 3, 30):
        assert equal(fresh.micro_batch(n, 2), in_order[n])


def test_validation_names_its_domains_and_pads_what_is_missing(mixture):
    config = mixture()
    config.evaluate.num_sequences_per_domain = 200
    reader = BatchReader(config, "valid")
    assert reader.num_sequences == 400
    batch = reader.micro_batch(199, 2)
    assert batch.domains == ["domain_big", "domain_small"]
    assert batch.sources == ["", "small"]
    assert batch.loss_mask[0].sum() == 0
    assert batch.loss_mask[1].sum() > 0


def test_a_limit_without_room_is_refused_only_where_documents_are_isolated(mixture):
    config = mixture()
    config.data.max_documents_per_sequence = 1
    with pytest.raises(ConfigError, match=r"data\.max_documents_per_sequence=1 must be at least 2"):
        BatchReader(config, "train")
    config.data.isolate_documents = False
    assert BatchReader(config, "train").micro_batch(0, 1).cu_seqlens.tolist() == [0, S]


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(mixture):
    config = mixture()
    config.model.vocab_size = 299
    with pytest.raises(ConfigError, match=r"model\.vocab_size=299 is smaller than the tokenizer's 300"):
        BatchReader(config, "train")
