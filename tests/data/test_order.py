from __future__ import annotations

import json
from pathlib import Path

import pytest

from phsa_megatron.config.documents import documents_limit
from phsa_megatron.config.errors import DataError
from phsa_megatron.data.order import SequenceOrder, describe_mismatch


def first_sequences(config, count: int = 40):
    order = SequenceOrder(config, "train")
    return [order.sequence(n) for n in range(count)]


def test_the_number_of_steps_batches_and_processes_changes_neither_order_nor_fingerprint(mixture):
    short, long = mixture(), mixture()
    long.run.train_steps = 100_000
    long.optim.global_batch_sequences, long.optim.micro_batch_sequences = 512, 8
    long.cluster.processes_per_node, long.cluster.num_nodes = 8, 64
    long.parallel.tensor_size = 8
    assert SequenceOrder(short, "train").fingerprint == SequenceOrder(long, "train").fingerprint
    assert first_sequences(short) == first_sequences(long)


def test_the_fingerprint_does_not_depend_on_where_the_files_lie(mixture, tmp_path):
    config, moved = mixture(), mixture()
    for name, source in moved.data.sources.items():
        for ending in (".bin", ".idx", ".json"):
            (tmp_path / f"{name}{ending}").write_bytes(Path(source.train_prefix + ending).read_bytes())
        source.train_prefix = str(tmp_path / name)
    assert SequenceOrder(config, "train").fingerprint == SequenceOrder(moved, "train").fingerprint


def change_seed(config) -> None:
    config.run.seed += 1


def change_length(config) -> None:
    config.data.seq_len_tokens = 16


def change_isolation(config) -> None:
    config.data.isolate_documents = False


def change_limit(config) -> None:
    config.data.max_documents_per_sequence = 9


def change_weight(config) -> None:
    config.data.sources["small"].weight = 2.0


def change_content(config) -> None:
    config.data.sources["small"].train_prefix = config.data.sources["big"].train_prefix


def change_sources(config) -> None:
    del config.data.sources["small"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (change_seed, "run.seed: 1234 in the checkpoint, 1235 now"),
        (change_length, "data.seq_len_tokens: 32 in the checkpoint, 16 now"),
        (change_isolation, "data.isolate_documents: True in the checkpoint, False now"),
        (change_limit, "data.max_documents_per_sequence: 8 in the checkpoint, 9 now"),
        (change_weight, "data.sources.small.weight: share 0.25 in the checkpoint, share 0.4 now"),
        (change_content, "data.sources.small.content: sha256 "),
        (change_sources, "data.sources.small.content: sha256 "),
    ],
)
def test_what_changes_the_order_changes_the_fingerprint_and_is_named_with_its_consequence(
    mixture, change, key
):
    saved = SequenceOrder(mixture(), "train")
    config = mixture()
    change(config)
    current = SequenceOrder(config, "train")
    assert saved.fingerprint != current.fingerprint
    # A checkpoint keeps the ingredients as JSON.
    message = describe_mismatch(json.loads(json.dumps(saved.ingredients)), current.ingredients)
    assert message is not None
    assert key in message
    assert "would see some sequences again and never see others" in message
    assert "run.init_from" in message


def test_equal_ingredients_have_no_mismatch(mixture):
    saved = SequenceOrder(mixture(), "train").ingredients
    assert (
        describe_mismatch(json.loads(json.dumps(saved)), SequenceOrder(mixture(), "train").ingredients)
        is None
    )


def test_tokens_are_those_of_the_documents_that_the_pieces_name(mixture):
    order = SequenceOrder(mixture(), "train")
    for number in range(30):
        sequence = order.sequence(number)
        tokens = order.tokens(sequence).tolist()
        documents = order.source(sequence.source)
        expected = []
        for piece in sequence.pieces:
            whole = documents.tokens(piece.document).tolist()
            expected += whole[piece.first_token : piece.first_token + piece.num_tokens]
        assert tokens == expected
        assert len(tokens) == 33


def test_nothing_to_validate_on_is_said(mixture):
    config = mixture()
    for source in config.data.sources.values():
        source.valid_prefix = None
    with pytest.raises(DataError, match="nothing to validate on"):
        SequenceOrder(config, "valid")


def test_one_validation_set_under_two_names_is_refused(mixture):
    config = mixture()
    config.data.sources["small"].valid_prefix = config.data.sources["big"].valid_prefix
    with pytest.raises(DataError, match="would count twice"):
        SequenceOrder(config, "valid")


def test_the_limit_of_documents_follows_from_the_length_unless_it_is_set(mixture):
    data = mixture().data
    assert documents_limit(data) == 8
    data.max_documents_per_sequence, data.seq_len_tokens = None, 512
    assert documents_limit(data) == 32


def test_sequences_that_are_passed_over_keep_their_numbers_and_change_no_fingerprint(mixture):
    plain, skipping = mixture(), mixture()
    skipping.data.skip_sequences = ["12", "3-5", "6-7"]
    order, shorter = SequenceOrder(plain, "train"), SequenceOrder(skipping, "train")
    kept = [n for n in range(40) if n not in (3, 4, 5, 6, 7, 12)]
    assert [shorter.number(at) for at in range(len(kept))] == kept
    assert [shorter.sequence(at) for at in range(len(kept))] == [order.sequence(n) for n in kept]
    assert shorter.sequence_at(4) == order.sequence(4)
    assert shorter.fingerprint == order.fingerprint
    valid = SequenceOrder(skipping, "valid")
    assert [valid.sequence(n) for n in range(4)] == [
        SequenceOrder(plain, "valid").sequence(n) for n in range(4)
    ]
