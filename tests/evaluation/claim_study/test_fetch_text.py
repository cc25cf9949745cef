import json
import shutil
import subprocess
import tarfile

import pytest

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.claim_study.extract import EXTRACTORS
from phsa_megatron.evaluation.claim_study.fetch_text import documents, fetch_texts
from phsa_megatron.evaluation.claim_study.packages import SOURCES, Source, fetch, read_files

LONG = "The owl flew over the hill, and the fox, who had seen it, went home. " * 4
ZH = "猫头鹰飞过山坡，狐狸看见了它，就回家去了。" * 12
SHEET = Source("english_prose", "tales", "plain", ("doc/*.txt",), ("*index*",))
VERSE = Source("chinese_verse", "verse@1.0.0", "poems", ("package/*.json",), join_chars=200)


def tgz(folder, name, files):
    """Writes a package as npm makes it."""
    root = folder / "tree"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    with tarfile.open(folder / name, "w:gz") as tar:
        for child in root.iterdir():
            tar.add(child, child.name)
    shutil.rmtree(root)
    return folder / name


def deb(folder, name, files):
    """Writes a package as Debian makes it."""
    root = folder / "tree"
    (root / "DEBIAN").mkdir(parents=True)
    control = (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: x\n"
    )
    (root / "DEBIAN/control").write_text(control)
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    (root / "doc/link.txt").symlink_to("a.txt")
    path = folder / f"{name}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(path)], check=True, capture_output=True)
    shutil.rmtree(root)
    return path


needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="makes a Debian package")


def tools(folder, monkeypatch, **scripts):
    """Puts programs of these names first on the PATH."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@needs_dpkg
def test_packages_become_one_file_a_domain_and_a_record_of_each(tmp_path):
    poems = [{"title": f"第{n}首", "paragraphs": [ZH + str(n)]} for n in range(4)]
    deb(tmp_path, "tales", {"doc/b.txt": LONG + "B", "doc/a.txt": LONG + "A", "doc/index.txt": LONG + "I"})
    tgz(tmp_path, "verse-1.0.0.tgz", {"package/p.json": json.dumps(poems)})
    out = tmp_path / "texts"
    lines = list(fetch_texts(tmp_path, out, [SHEET, VERSE]))
    read = {p.stem: [json.loads(x) for x in p.read_text("utf-8").splitlines()] for p in out.glob("*.jsonl")}
    assert [x["text"][-1] for x in read["english_prose"]] == ["A", "B"]  # in order, no link, no index
    assert [x["text"].split("\n")[0] for x in read["chinese_verse"]] == [f"第{n}首" for n in range(4)]
    records = json.loads((out / "packages.json").read_text())
    assert [(r["file"], r["documents"]) for r in records] == [
        ("tales_1.0_all.deb", 2),
        ("verse-1.0.0.tgz", 4),
    ]
    assert all(len(r["sha256"]) == 64 for r in records) and "2 documents" in lines[0]
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    list(fetch_texts(tmp_path, out, [SHEET, VERSE]))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_only_what_is_not_in_the_folder_is_downloaded(tmp_path, monkeypatch):
    tools(
        tmp_path / "bin",
        monkeypatch,
        apt_get='echo "$@" >>calls; shift; for p in "$@"; do : >"${p}_2.0_all.deb"; done',
        npm='echo npm "$@" >>calls; : >verse-1.0.0.tgz',
    )
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tales_1%3a1.0_all.deb").touch()
    (folder / "tales-more_1.0_all.deb").touch()  # another package
    wanted = ["tales", "more", "verse@1.0.0", "manuals"]
    found = fetch(wanted, folder)
    assert (folder / "calls").read_text() == "download more manuals\nnpm pack --silent verse@1.0.0\n"
    assert [found[name].name for name in wanted] == [
        "tales_1%3a1.0_all.deb",
        "more_2.0_all.deb",
        "verse-1.0.0.tgz",
        "manuals_2.0_all.deb",
    ]
    assert fetch(wanted, folder) == found
    assert len((folder / "calls").read_text().splitlines()) == 2


def test_downloads_that_fail_say_what_to_do(tmp_path, monkeypatch):
    tools(tmp_path / "bin", monkeypatch, apt_get="echo no package >&2; exit 100")
    with pytest.raises(DataError, match=r"(?s)`apt-get download tales` failed: no package.*apt-get update"):
        fetch(["tales"], tmp_path)
    tools(tmp_path / "quiet", monkeypatch, apt_get="exit 0")
    with pytest.raises(DataError, match="tales not there after the download"):
        fetch(["tales"], tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not on this machine. Run `npm pack"):
        fetch(["verse@1.0.0"], tmp_path)


def test_two_versions_of_a_package_are_refused(tmp_path):
    for version in ("1.0", "2.0"):
        (tmp_path / f"tales_{version}_all.deb").touch()
    with pytest.raises(DataError, match="tales_1.0_all.deb and tales_2.0_all.deb are one package"):
        fetch(["tales"], tmp_path)


def test_an_archive_without_the_files_and_a_damaged_one_are_refused(tmp_path):
    archive = tgz(tmp_path, "verse-1.0.0.tgz", {"package/poems.txt": "x" * 5000})
    with pytest.raises(DataError, match=r"no file like package/\*.json: this version of verse@1.0.0"):
        read_files(archive, [VERSE])
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(DataError, match="damaged"):
        read_files(archive, [VERSE])


@needs_dpkg
def test_a_damaged_debian_package_is_refused(tmp_path):
    archive = deb(tmp_path, "tales", {"doc/a.txt": LONG})
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match="tales_1.0_all.deb"):
        read_files(archive, [SHEET])


def test_repeated_paragraphs_short_and_untranslated_documents_are_left_out():
    licence = "This page comes with absolutely no warranty of any kind, to the extent of the law.\n"
    files = {"doc/1.txt": f"{licence}{LONG}1", "doc/2.txt": f"{licence}{LONG}2", "doc/3.txt": "Short."}
    found = list(documents(SHEET, {path: text.encode() for path, text in files.items()}))
    assert found == [f"{licence}{LONG}1", f"{LONG}2"]
    chinese = Source("chinese_prose", "x", "plain", ("*",), least_han_frac=0.15)
    texts = {"a": LONG, "b": ZH, "c": LONG[:250] + ZH[:40], "d": LONG[:250] + ZH[:60]}
    kept = list(documents(chinese, {path: text.encode() for path, text in texts.items()}))
    assert kept == [texts["b"], texts["d"]]  # of c about a tenth is Chinese, of d more than 0.15


def test_the_list_names_no_dictionary_and_only_known_kinds_and_domains():
    assert {s.domain for s in SOURCES} == {
        "english_prose",
        "english_manuals",
        "chinese_prose",
        "chinese_verse",
    }
    assert {s.kind for s in SOURCES} == set(EXTRACTORS)
    assert not [s for s in SOURCES if s.package.startswith(("dict-", "wordnet", "jargon"))]
