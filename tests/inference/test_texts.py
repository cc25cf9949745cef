import json

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.inference.generator import Completion
from phsa_megatron.inference.sampling import Sampling
from phsa_megatron.inference.texts import TextGenerator, read_prompts


def test_prompts_are_lines_or_objects(tmp_path):
    plain, objects = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text("one\n\ntwo words\n")
    objects.write_text(json.dumps({"prompt": "é", "answer": 3}) + "\n")
    assert read_prompts(plain) == [{"prompt": "one"}, {"prompt": "two words"}]
    assert read_prompts(objects) == [{"prompt": "é", "answer": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        (b'{"text": "a"}\n', 'line 1: needs an object with a text under "prompt"'),
        (b"[1]\n", "line 1: needs an object"),
        (b"\n", "holds no prompt"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


class Bytes:
    """A tokenizer of bytes: 0 ends a document."""

    eod_id = 0

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class Fixed:
    """Generates given tokens."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.asked = []

    def generate(self, prompts, sampling, *, first_number=0, on_token=None):
        self.asked.append((prompts, first_number))
        for token in self.tokens if on_token else []:
            on_token(0, token)
        return [Completion(list(self.tokens), "stop") for _ in prompts]


def test_streamed_pieces_are_whole_characters_and_add_up():
    text = "añb→c"
    pieces = []
    texts = TextGenerator(Fixed([*text.encode(), 0]), Bytes(), Sampling())
    texts.stream("", pieces.append)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_ends_is_shown_at_the_end():
    pieces = []
    TextGenerator(Fixed([*b"a", 0xC3]), Bytes(), Sampling()).stream("x", pieces.append)
    assert "".join(pieces) == "a\ufffd"


def test_batches_keep_order_keys_and_numbers_of_prompts():
    fixed, told = Fixed([65, 0]), []
    records = [{"prompt": p, "n": i} for i, p in enumerate(["a", "", "c"])]
    done = list(TextGenerator(fixed, Bytes(), Sampling()).complete(records, 2, told.append))
    assert fixed.asked == [([[97], [0]], 0), ([[99]], 2)]
    assert told == [4, 2]
    added = {"completion": "A", "num_prompt_tokens": 1, "num_tokens": 2, "finish_reason": "stop"}
    assert done == [record | added for record in records]
