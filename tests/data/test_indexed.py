from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.tokenizer import Tokenizer

TEXTS = ["first document", "第二个文档。", "a third, longer document"]


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file, "<|endoftext|>")


@pytest.fixture
def prefix(tmp_path: Path, make_set) -> Path:
    return make_set(tmp_path / "set.v1", TEXTS)


def test_documents_and_parts_of_them_are_read(prefix, tokenizer):
    source = IndexedSource(prefix, tokenizer.sha256)
    expected = [tokenizer.encode(text) + [tokenizer.eod_id] for text in TEXTS]
    assert len(source) == 3
    assert source.num_tokens == sum(map(len, expected))
    assert source.lengths.tolist() == [len(ids) for ids in expected]
    assert np.diff(source.offsets).tolist() == source.lengths.tolist()
    for document, ids in enumerate(expected):
        assert source.tokens(document).tolist() == ids
        assert source.tokens(document, 2, 3).tolist() == ids[2:5]


def test_tokens_outlive_the_source_they_came_from(prefix, tokenizer):
    ids = IndexedSource(prefix, tokenizer.sha256).tokens(0)
    assert ids.tolist() == tokenizer.encode(TEXTS[0]) + [tokenizer.eod_id]


def test_the_content_hash_follows_the_content_not_the_place(prefix, tokenizer, tmp_path, make_set):
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{ending}", tmp_path / f"copy{ending}")
    same = IndexedSource(tmp_path / "copy", tokenizer.sha256).content_sha256
    assert same == IndexedSource(prefix, tokenizer.sha256).content_sha256
    other = make_set(tmp_path / "other", [*TEXTS[:2], "another"])
    assert IndexedSource(other, tokenizer.sha256).content_sha256 != same


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize(("change", "state"), [(-2, "truncated"), (+2, "too long")])
def test_a_file_of_another_size_is_refused_with_both_sizes_and_the_fix(
    prefix, tokenizer, ending, change, state
):
    path = Path(f"{prefix}{ending}")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(DataError) as caught:
        IndexedSource(prefix, tokenizer.sha256)
    message = str(caught.value)
    assert f"{path} is {state}: {len(content) + change:,} bytes, but {len(content):,}" in message
    assert "prepare-data --overwrite" in message


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_a_missing_file_is_named(prefix, tokenizer, ending):
    Path(f"{prefix}{ending}").unlink()
    with pytest.raises(DataError, match=rf"set\.v1\{ending} does not exist"):
        IndexedSource(prefix, tokenizer.sha256)


def test_ids_of_another_tokenizer_are_refused(prefix):
    with pytest.raises(DataError, match="was prepared with another tokenizer.*0000000000000000"):
        IndexedSource(prefix, "0" * 64)


def test_files_of_two_sets_are_refused_though_their_sizes_agree(prefix, tokenizer):
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_text())
    content["num_tokens"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="do not belong together"):
        IndexedSource(prefix, tokenizer.sha256)


def test_changed_content_of_the_same_size_is_found_when_it_is_asked_for(prefix, tokenizer):
    path = Path(f"{prefix}.bin")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    source = IndexedSource(prefix, tokenizer.sha256)
    source.verify_content()
    path.write_bytes(content)
    with pytest.raises(DataError, match="its content has changed"):
        source.verify_content()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as JSON"),
        ("[1]", "format_version=None"),
        ('{"format_version": 99}', "format_version=99; this program reads 1"),
        ('{"format_version": 1}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(prefix, tokenizer, content, message):
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(DataError, match=message):
        IndexedSource(prefix, tokenizer.sha256)
