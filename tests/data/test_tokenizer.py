from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.models import WordLevel

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.tokenizer import Tokenizer

TEXTS = [
    "Hello, world. Why not?",
    "今天天气很好，我们去散步。\n\n他说：“好的！”",
    "def f(x):\n\treturn x + 1  # 1234567890\r\n",
    "emoji 🙂 and 𝒳, naïve café",
    "",
]


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file, "<|endoftext|>")


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip_and_its_ids_account_for_every_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_a_batch_is_encoded_like_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_text_is_normalized_to_nfc_and_bytes_count_the_normalized_text(tokenizer):
    decomposed = unicodedata.normalize("NFD", "café")
    ids = tokenizer.encode(decomposed)
    assert tokenizer.decode(ids) == "café" != decomposed
    assert tokenizer.token_num_bytes()[ids].sum() == len("café".encode())


def test_text_cannot_forge_the_end_of_a_document(tokenizer):
    text = "before <|endoftext|> after"
    ids = tokenizer.encode(text)
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text


def test_decoded_tokens_are_what_each_id_decodes_to_alone(tokenizer):
    decoded = tokenizer.decoded_tokens()
    assert len(decoded) == tokenizer.vocab_size == 300
    assert decoded == [tokenizer.decode([i]) for i in range(300)]
    assert decoded[tokenizer.eod_id] == "<|endoftext|>"
    # A byte that is only part of a character stands alone as the replacement character.
    assert any("\ufffd" in text for text in decoded)


def test_the_end_of_document_token_stands_for_no_bytes(tokenizer):
    assert tokenizer.token_num_bytes()[tokenizer.eod_id] == 0
    assert (tokenizer.token_num_bytes() > 0).sum() == 299


def test_a_missing_file_is_named_with_the_way_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json does not exist.*prepare-tokenizer"):
        Tokenizer.from_file(tmp_path / "nowhere.json", "<|endoftext|>")


@pytest.mark.parametrize("content", [b"{}", b"not json", json.dumps({"vocab": {}}).encode(), b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match="is not a Hugging Face tokenizer.json"):
        Tokenizer.from_file(tmp_path / "t.json", "<|endoftext|>")


def test_an_absent_end_of_document_token_is_named_beside_the_ones_there_are(tokenizer_file):
    with pytest.raises(DataError, match=r"data\.eod_token='</s>' is not in the tokenizer.*<\|endoftext\|>"):
        Tokenizer.from_file(tokenizer_file, "</s>")


def test_bytes_of_a_vocabulary_that_is_not_byte_level_are_refused(tmp_path):
    HuggingFaceTokenizer(WordLevel({"[end]": 0, "今天": 1}, unk_token="[end]")).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="not a byte-level BPE: token 1"):
        Tokenizer.from_file(tmp_path / "t.json", "[end]").token_num_bytes()
