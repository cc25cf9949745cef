from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.readers import BadRecord, Record, cut, read

TEXTS = ["first text", "第二段文字。", "", "with\nlines\n", "last"]


def write(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines))
    elif path.name.endswith(".zst"):
        path.write_bytes(zstandard.compress(lines))
    elif path.name.endswith(".parquet"):
        parquet.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), path, row_group_size=2)
    else:
        path.write_bytes(lines)
    return path


def read_all(path: Path, text_field: str = "text", shard_bytes: int = 1 << 20) -> list[Record | BadRecord]:
    return [record for shard in cut(path, shard_bytes)[1] for record in read(shard, text_field)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.parquet"])
def test_every_format_gives_the_same_texts(tmp_path, name):
    assert read_all(write(tmp_path / name, TEXTS)) == [Record(text) for text in TEXTS]


def test_a_txt_file_is_one_document(tmp_path):
    (tmp_path / "a.b.txt").write_text("one\n\ntwo 。\n", encoding="utf-8")
    assert read_all(tmp_path / "a.b.txt") == [Record("one\n\ntwo 。\n")]


def test_several_compressed_frames_in_a_row_are_all_read(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in ("a", "b")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(line) for line in lines))
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(line) for line in lines))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert read_all(tmp_path / name) == [Record("a"), Record("b")], name


@pytest.mark.parametrize("shard_bytes", [1, 30, 64, 100, 10_000])
@pytest.mark.parametrize("last_newline", [True, False])
def test_a_file_cut_into_shards_gives_each_record_once_with_its_line(tmp_path, shard_bytes, last_newline):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "x" * (7 * i % 40)}) if i % 5 else "broken" for i in range(60)]
    path.write_text("\n".join(lines) + "\n" * last_newline)
    record, shards = cut(path, shard_bytes)
    assert sum(shard.num_bytes for shard in shards) == record.num_bytes == path.stat().st_size
    assert (len(shards) > 1) == (shard_bytes < record.num_bytes)
    found = read_all(path, shard_bytes=shard_bytes)
    assert len(found) == 60
    for i, record_ in enumerate(found):
        if i % 5:
            assert record_ == Record("x" * (7 * i % 40))
        else:
            assert isinstance(record_, BadRecord)
            assert record_.where == f"{path}:{i + 1}"


def test_a_shard_border_inside_a_read_and_between_two_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("phsa_megatron.data.readers._READ_BYTES", 17)
    path = write(tmp_path / "a.jsonl", [f"text number {i}" for i in range(40)])
    for shard_bytes in (1, 16, 17, 18, 34, 100):
        assert read_all(path, shard_bytes=shard_bytes) == [Record(f"text number {i}") for i in range(40)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "invalid JSON"),
        (b'["a"]', "a JSON list, not an object"),
        (b'{"body": "a"}', "no field 'text'; fields: 'body'"),
        (b'{"text": 7}', "'text' is int, not a string"),
        (b'{"text": null}', "'text' is NoneType, not a string"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_reported_with_file_line_and_reason(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    found = read_all(path)
    assert [type(record) for record in found] == [Record, BadRecord, Record]
    assert str(found[1]).startswith(f"{path}:3: ")
    assert why in str(found[1])


def test_invalid_utf8_in_a_txt_file_is_reported_with_its_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xe4\xbd")
    assert str(read_all(tmp_path / "a.txt")[0]) == f"{tmp_path / 'a.txt'}:3: invalid UTF-8 at byte 8"


def test_a_null_in_a_parquet_column_is_a_bad_record_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b", None, "d"]}), path, row_group_size=2)
    found = read_all(path)
    assert found[:2] + found[3:] == [Record("a"), Record("b"), Record("d")]
    assert str(found[2]) == f"{path}:3: 'text' is NoneType, not a string"


def test_a_missing_parquet_column_is_named_beside_those_there_are(tmp_path):
    path = write(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(DataError, match=r"no column 'body'; columns: n, text.*--text-field"):
        read_all(path, "body")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz"])
def test_a_truncated_archive_is_an_error_not_a_short_file(tmp_path, name):
    path = write(tmp_path / name, [f"text {i} {i * 7919 % 1000}" for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=rf"{name} is damaged after line \d+"):
        read_all(path)


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet file"):
        cut(tmp_path / "a.parquet")


def test_an_unknown_ending_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file.*\.parquet"):
        cut(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        cut(tmp_path / "none.txt")
