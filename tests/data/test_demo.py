from __future__ import annotations

import json
import lzma

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.data import demo
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.tokenizer import Tokenizer

CORPUS_MIB = 4.0


def documents(domain: str, split: str) -> list[dict[str, str]]:
    with lzma.open(demo.corpus_file(domain, split), "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_the_shipped_text_is_split_by_document(domain):
    train, valid = documents(domain, "train"), documents(domain, "valid")
    assert not {d["id"] for d in train} & {d["id"] for d in valid}
    lines = {line for d in train for line in d["text"].split("\n") if len(line) >= 40}
    shared = [line for d in valid for line in d["text"].split("\n") if line in lines]
    assert shared == []
    share = sum(len(d["text"]) for d in valid) / sum(len(d["text"]) for d in [*train, *valid])
    assert 0.03 < share < 0.08


@pytest.mark.parametrize(("domain", "least_frac"), [("english", 0.0), ("chinese", 0.7)])
def test_the_shipped_text_is_in_its_language_and_long(domain, least_frac):
    train = documents(domain, "train")
    text = "".join(d["text"] for d in train)
    han = sum("\u4e00" <= c <= "\u9fff" for c in text) / len(text)
    assert han >= least_frac
    assert (han < 0.001) == (domain == "english")
    assert {d["domain"] for d in train} == {domain}
    # Most text lies in documents far longer than the 144 tokens that PHSA always attends to.
    assert sum(len(d["text"]) for d in train if len(d["text"]) > 2000) > 0.9 * len(text)


def test_the_shipped_corpus_is_small_and_names_the_licence_of_each_source():
    folder = demo.corpus_file("english", "train").parent
    assert sum(path.stat().st_size for path in folder.iterdir()) < CORPUS_MIB * 2**20
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for origin in ("janeaustenr", "debian-handbook", "cataclysm-dda"):
        assert origin in licences


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """The same files with a few documents, and a smaller vocabulary: the whole takes ten seconds."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for domain in demo.DOMAINS:
        for split in demo.SPLITS:
            few = documents(domain, split)[:3]
            with lzma.open(folder / f"{domain}_{split}.jsonl.xz", "wt", encoding="utf-8") as stream:
                stream.writelines(json.dumps(d) + "\n" for d in few)
    monkeypatch.setattr(demo, "corpus_file", lambda domain, split: folder / f"{domain}_{split}.jsonl.xz")
    monkeypatch.setattr(demo, "VOCAB_SIZE", 1000)
    return folder


def test_the_demo_is_prepared_once_and_kept_while_it_is_intact(small_corpus, tmp_path):
    output = tmp_path / "demo"
    first = list(demo.prepare_demo_sets(output))
    assert len(first) == 5
    assert not any("kept" in line for line in first)
    tokenizer = Tokenizer.from_file(output / "tokenizer.json", "<|endoftext|>")
    assert tokenizer.vocab_size == 1000
    for domain in demo.DOMAINS:
        for split in demo.SPLITS:
            source = IndexedSource(output / f"{domain}_{split}", tokenizer.sha256)
            texts = list(demo.read_texts(domain, split))
            assert [tokenizer.decode(source.tokens(i)[:-1]) for i in range(len(source))] == texts

    before = {path: path.read_bytes() for path in output.iterdir()}
    assert all("kept" in line for line in demo.prepare_demo_sets(output))

    # A damaged set is made again, and only that one; the result is the same.
    damaged = output / "chinese_valid.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    lines = list(demo.prepare_demo_sets(output))
    assert [line for line in lines if "kept" not in line] == [lines[-1]]
    assert {path: path.read_bytes() for path in output.iterdir()} == before

    # A tokenizer that is not the recorded one is made again, byte for byte the same, so the sets stay good.
    (output / "tokenizer.json").write_text("{}")
    lines = list(demo.prepare_demo_sets(output))
    assert [line for line in lines if "kept" not in line] == [lines[0]]
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_corpus_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "corpus_file", lambda domain, split: tmp_path / "gone.jsonl.xz")
    with pytest.raises(DataError, match=r"gone\.jsonl\.xz is missing from this installation"):
        list(demo.read_texts("english", "train"))
