import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.tasks.perplexity import by_position, edges, read_texts


def test_edges_double_up_to_the_length():
    assert edges(1000) == [1, 128, 256, 512, 1000]
    assert edges(100) == [1, 100]


def test_each_token_but_the_first_is_in_one_part(scripted):
    answerer = scripted(str)
    text = "the red lamp " * 300
    num_tokens = len(answerer.encode(text))
    parts = by_position(answerer, text, [1, 128, 256, 10_000])
    assert [part.num_tokens for part in parts] == [127, 128, num_tokens - 256]
    # The scripted model loses as many nats at a token as its position is.
    assert [part.nats for part in parts] == [
        sum(range(1, 128)),
        sum(range(128, 256)),
        sum(range(256, num_tokens)),
    ]


def test_a_text_is_cut_at_the_last_bound_and_a_short_one_has_fewer_parts(scripted):
    answerer = scripted(str)
    assert [part.num_tokens for part in by_position(answerer, "so and " * 500, [1, 128, 200])] == [127, 72]
    assert len(by_position(answerer, "so and so", [1, 128, 200])) == 1
    assert by_position(answerer, "", [1, 128]) == []


def test_texts_come_from_txt_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "three"}\n\n{"text": "四"}\n', encoding="utf-8")
    assert [text for _, text in read_texts(tmp_path)] == ["three", "四", "one\ntwo"]


def test_missing_texts_are_asked_for(tmp_path):
    with pytest.raises(DataError, match=r"texts_dir=FOLDER is missing.*\*.txt, or \*.jsonl"):
        list(read_texts(None))
    with pytest.raises(DataError, match=rf"\*.txt or \*.jsonl not found.*put them into {tmp_path}"):
        list(read_texts(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl, line 1: a record without the field text"):
        list(read_texts(tmp_path))
