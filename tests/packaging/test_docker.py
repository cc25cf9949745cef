"""The Dockerfile installs what training needs, pinned, and copies what it may see."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FROM_THE_BASE = {"torch", "numpy"}


def test_every_dependency_of_training_is_installed_and_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    names = {re.match(r"[a-z0-9-]+", requirement).group() for requirement in needed}
    (listed,) = re.findall(r"\^\((.*?)\)==", DOCKERFILE)
    pinned = {line.split("==")[0] for line in (ROOT / "constraints/py312.txt").read_text().splitlines()}
    assert names - FROM_THE_BASE <= set(listed.split("|")) <= pinned
    assert not FROM_THE_BASE & set(listed.split("|"))


def test_what_is_copied_is_not_ignored():
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for source in line.split()
    }
    assert copied == seen and all((ROOT / source).exists() for source in copied)


def test_the_base_has_a_tag_and_the_process_is_not_root():
    (base,) = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert re.search(r":\d\d\.\d\d-py3$", base)
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    assert "PYTHONSAFEPATH=1" in DOCKERFILE and "HEALTHCHECK" in DOCKERFILE
