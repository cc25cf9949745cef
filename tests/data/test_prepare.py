from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.data.manifest import FileRecord, Manifest
from phsa_megatron.data.prepare import PrepareRequest, prepare
from phsa_megatron.data.progress import ShardProgress
from phsa_megatron.data.readers import Shard
from phsa_megatron.data.shards import ShardResult
from phsa_megatron.data.tokenizer import Tokenizer

ENDINGS = (".bin", ".idx", ".json")


def texts_of(count: int, seed: int = 0) -> list[str]:
    words = ["the", "cat", "sat,", "今天", "天气。", "why?", "red\n"]
    dice = random.Random(seed)
    return [" ".join(dice.choices(words, k=dice.randint(1, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def left_over(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(name))


def test_the_set_holds_each_document_and_its_end_and_says_what_it_holds(tmp_path, tokenizer_file):
    texts = texts_of(40)
    texts[3] = ""
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("a whole file", encoding="utf-8")
    manifest = prepare(PrepareRequest([source, tmp_path / "b.txt"], tmp_path / "out/set.v1", tokenizer_file))

    tokenizer = Tokenizer.from_file(tokenizer_file, "<|endoftext|>")
    expected = [tokenizer.encode(text) + [tokenizer.eod_id] for text in [*texts, "a whole file"] if text]
    written = IndexedDataset(str(tmp_path / "out/set.v1"))
    assert [written[i].tolist() for i in range(len(written))] == expected
    assert written.index.dtype is np.uint16

    assert manifest == Manifest.read(tmp_path / "out/set.v1.json")
    assert (manifest.num_documents, manifest.num_empty_documents, manifest.num_bad_records) == (40, 1, 0)
    assert manifest.num_tokens == sum(map(len, expected))
    assert manifest.text_num_bytes == sum(len(text.encode()) for text in [*texts, "a whole file"])
    assert (manifest.dtype, manifest.vocab_size, manifest.eod_id) == ("uint16", 300, tokenizer.eod_id)
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.input_files == [FileRecord.of(source), FileRecord.of(tmp_path / "b.txt")]
    assert manifest.bin_file.sha256 == FileRecord.of(tmp_path / "out/set.v1.bin").sha256
    assert left_over(tmp_path / "out", "set") == ["set.v1.bin", "set.v1.idx", "set.v1.json"]


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, tokenizer_file):
    content = json.loads(tokenizer_file.read_text())
    last = {**content["added_tokens"][0], "id": 70_000, "content": "<|last|>"}
    content["added_tokens"].append(last)
    content["model"]["vocab"]["<|last|>"] = 70_000
    (tmp_path / "t.json").write_text(json.dumps(content))
    request = PrepareRequest(
        [write_jsonl(tmp_path / "a.jsonl", ["x"])], tmp_path / "set", tmp_path / "t.json", "<|last|>"
    )
    assert prepare(request).dtype == "int32"
    written = IndexedDataset(str(tmp_path / "set"))
    assert written[0][-1] == 70_000


def test_the_number_of_workers_and_shards_does_not_change_a_byte(tmp_path, tokenizer_file):
    source = write_jsonl(tmp_path / "a.jsonl", texts_of(200))
    contents = set()
    for index, (workers, shard_bytes) in enumerate([(1, 1 << 20), (1, 3000), (2, 3000)]):
        output = tmp_path / f"set{index}"
        prepare(
            PrepareRequest([source], output, tokenizer_file, num_workers=workers, shard_bytes=shard_bytes)
        )
        contents.add(tuple((tmp_path / f"set{index}{end}").read_bytes() for end in (".bin", ".idx")))
    assert len(contents) == 1


BAD_LINES = b'{"text": "good"}\nbroken\n{"text": 3}\n{"text": "also good"}\n'


def test_bad_records_are_all_named_and_nothing_is_written(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES)
    with pytest.raises(DataError) as caught:
        prepare(PrepareRequest([tmp_path / "a.jsonl"], tmp_path / "set", tokenizer_file))
    message = str(caught.value)
    assert "2 bad records, --max-bad-records allows 0" in message
    assert f"{tmp_path / 'a.jsonl'}:2: invalid JSON" in message
    assert f"{tmp_path / 'a.jsonl'}:3: 'text' is int" in message
    assert "--max-bad-records 2" in message
    assert not any((tmp_path / f"set{ending}").exists() for ending in ENDINGS)


def test_allowed_bad_records_are_left_out_whole_and_recorded(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES)
    request = PrepareRequest([tmp_path / "a.jsonl"], tmp_path / "set", tokenizer_file, max_bad_records=2)
    manifest = prepare(request)
    assert (manifest.num_documents, manifest.num_bad_records) == (2, 2)
    assert [text.split(": ")[0] for text in manifest.bad_records] == [
        f"{tmp_path / 'a.jsonl'}:{n}" for n in (2, 3)
    ]
    tokenizer = Tokenizer.from_file(tokenizer_file, "<|endoftext|>")
    written = IndexedDataset(str(tmp_path / "set"))
    assert [tokenizer.decode(written[i][:-1]) for i in range(2)] == ["good", "also good"]


def test_an_existing_set_is_kept_unless_it_may_be_overwritten(tmp_path, tokenizer_file):
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", ["one"]),
        write_jsonl(tmp_path / "b.jsonl", ["two", "three"]),
    )
    prepare(PrepareRequest([first], tmp_path / "set", tokenizer_file))
    before = [(tmp_path / f"set{ending}").read_bytes() for ending in ENDINGS]
    with pytest.raises(DataError, match="--overwrite"):
        prepare(PrepareRequest([second], tmp_path / "set", tokenizer_file))
    assert [(tmp_path / f"set{ending}").read_bytes() for ending in ENDINGS] == before
    assert (
        prepare(PrepareRequest([second], tmp_path / "set", tokenizer_file, overwrite=True)).num_documents == 2
    )


@pytest.mark.parametrize("content", [b"", b'{"text": ""}\n'])
def test_files_without_a_document_are_refused(tmp_path, tokenizer_file, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="hold no document"):
        prepare(PrepareRequest([tmp_path / "a.jsonl"], tmp_path / "set", tokenizer_file))


SCRIPT = """
import sys
from pathlib import Path
from phsa_megatron.parallel import cpu_shim

if __name__ == "__main__":
    cpu_shim.install()
    from phsa_megatron.data.prepare import PrepareRequest, prepare
    source, output, tokenizer, workers = sys.argv[1:]
    paths = ([Path(source)], Path(output), Path(tokenizer))
    prepare(PrepareRequest(*paths, num_workers=int(workers), shard_bytes=2000))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_it_goes_on_from_the_finished_parts(
    tmp_path, tokenizer_file, workers, monkeypatch
):
    source = write_jsonl(tmp_path / "a.jsonl", texts_of(300))
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        str(source),
        str(tmp_path / "set"),
        str(tokenizer_file),
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root}/kernels:{root}/launch"}
    process = subprocess.Popen(
        [*command, str(workers)], stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "shard 5/" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    assert process.wait(timeout=60) == -signal.SIGKILL, (
        "it was over before it could be killed: this shows nothing"
    )
    process.stderr.close()
    finished = list((tmp_path / "set.parts").glob("shard-*.json"))
    assert len(finished) >= 5
    assert not any((tmp_path / f"set{ending}").exists() for ending in ENDINGS)

    # One finished part is damaged meanwhile: it is noticed and done again.
    finished[0].with_suffix(".bin").write_bytes(b"damaged")
    kept: list[bool] = []

    def note(self: ShardProgress, shard: Shard, result: ShardResult, **names: bool) -> None:
        kept.append(names["kept"])

    monkeypatch.setattr(ShardProgress, "finished", note)
    manifest = prepare(PrepareRequest([source], tmp_path / "set", tokenizer_file, shard_bytes=2000))
    assert kept.count(True) == len(finished) - 1
    assert kept.count(False) >= 1
    assert manifest.num_documents == 300
    prepare(PrepareRequest([source], tmp_path / "straight", tokenizer_file))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"set{ending}").read_bytes() == (tmp_path / f"straight{ending}").read_bytes()
    assert not (tmp_path / "set.parts").exists()


def test_parts_of_other_inputs_are_not_used(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES)
    with pytest.raises(DataError, match="bad records"):
        prepare(PrepareRequest([tmp_path / "a.jsonl"], tmp_path / "set", tokenizer_file))
    assert (tmp_path / "set.parts" / "shard-000000.json").exists()
    write_jsonl(tmp_path / "a.jsonl", ["something else"])
    prepare(PrepareRequest([tmp_path / "a.jsonl"], tmp_path / "set", tokenizer_file))
    tokenizer = Tokenizer.from_file(tokenizer_file, "<|endoftext|>")
    written = IndexedDataset(str(tmp_path / "set"))
    assert tokenizer.decode(written[0][:-1]) == "something else"


@pytest.mark.parametrize(("limit_bytes", "shard_bytes"), [(2000, 1 << 20), (20_000, 4000)])
def test_a_full_disk_names_the_file_and_leaves_nothing_under_a_final_name(
    tmp_path, tokenizer_file, limit_bytes, shard_bytes
):
    # The first limit is met by a part, the second only by the merged file. A file size limit fails the same
    # system call as a full disk, with another number.
    source = write_jsonl(tmp_path / "a.jsonl", texts_of(600))
    request = PrepareRequest([source], tmp_path / "set", tokenizer_file, shard_bytes=shard_bytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write .*set.*Free space there"):
            prepare(request)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_over(tmp_path, "set") == ["set.parts"]
    assert prepare(request).num_documents == 600


def test_a_second_process_on_the_same_set_is_refused(tmp_path, tokenizer_file):
    import fcntl

    (tmp_path / "set.parts").mkdir()
    with (tmp_path / "set.parts" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing this set"):
            prepare(
                PrepareRequest([write_jsonl(tmp_path / "a.jsonl", ["x"])], tmp_path / "set", tokenizer_file)
            )


def test_a_broken_pipe_of_another_kind_is_not_called_a_full_disk(tmp_path, tokenizer_file, monkeypatch):
    def denied(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("phsa_megatron.data.shards.write_json_durably", denied)
    with pytest.raises(PermissionError):
        prepare(PrepareRequest([write_jsonl(tmp_path / "a.jsonl", ["x"])], tmp_path / "set", tokenizer_file))


def test_text_that_spells_the_end_of_document_token_makes_no_second_document(tmp_path, tokenizer_file):
    prepare(
        PrepareRequest(
            [write_jsonl(tmp_path / "a.jsonl", ["a <|endoftext|> b"])], tmp_path / "set", tokenizer_file
        )
    )
    written = IndexedDataset(str(tmp_path / "set"))
    ids = written[0].tolist()
    assert ids.count(Tokenizer.from_file(tokenizer_file, "<|endoftext|>").eod_id) == 1


def test_another_vocabulary_gives_another_manifest(tmp_path, tokenizer_file):
    train_bpe(texts_of(50), 280).save(str(tmp_path / "t.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    one = prepare(PrepareRequest([source], tmp_path / "one", tokenizer_file))
    two = prepare(PrepareRequest([source], tmp_path / "two", tmp_path / "t.json"))
    assert one.tokenizer_sha256 != two.tokenizer_sha256
