from __future__ import annotations

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.bpe import train_bpe

TEXTS = ["the cat sat on the mat. " * 5, "今天天气很好，今天去散步。" * 5, "def f(x):\n    return x\n" * 5]


def test_two_trainings_give_the_same_tokenizer_to_the_last_byte():
    assert train_bpe(TEXTS, 300).to_str() == train_bpe(TEXTS, 300).to_str()


def test_other_texts_give_another_tokenizer():
    assert train_bpe(TEXTS, 300).to_str() != train_bpe(TEXTS[:2], 280).to_str()


def test_the_end_of_document_token_and_all_bytes_are_in_the_vocabulary():
    tokenizer = train_bpe(TEXTS, 300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    unseen = "Ω≈ç√ 🙂 \x00\x7f"
    assert tokenizer.decode(tokenizer.encode(unseen).ids) == unseen


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused():
    with pytest.raises(DataError, match="only give .* tokens of the 5000"):
        train_bpe(TEXTS, 5000)


def test_a_vocabulary_without_room_for_a_merge_is_refused():
    with pytest.raises(DataError, match="vocab_size=257 leaves no room"):
        train_bpe(TEXTS, 257)
