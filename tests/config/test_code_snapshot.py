import subprocess
from pathlib import Path

import pytest

from phsa_megatron.config import code_snapshot
from phsa_megatron.config.code_snapshot import write_code_snapshot


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a package of one file, which takes the place of ours."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("one\n")
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    settings = ["-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "."], [*settings, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(package.parent), *command], check=True)
    monkeypatch.setattr(code_snapshot.phsa_megatron, "__file__", str(package / "__init__.py"))
    return package


def _commit(package):
    command = ["git", "-C", str(package), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_code_can_be_had_again_from_commit_and_patch(checkout, tmp_path):
    code = tmp_path / "code"
    assert write_code_snapshot(code) == f"commit {_commit(checkout)[:12]}, in {checkout.parent}"
    assert (code / "changes.patch").read_text() == ""
    (checkout / "__init__.py").write_text("two\n")
    (checkout / "new.py").write_text("new\n")
    assert write_code_snapshot(code).startswith(f"commit {_commit(checkout)[:12]}, with changes")
    assert (code / "untracked").read_text() == "package/new.py\n"
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(checkout.parent), str(clone)], check=True)
    apply = ["git", "-C", str(clone), "apply", str((code / "changes.patch").resolve())]
    subprocess.run(apply, check=True)
    assert (clone / "package" / "__init__.py").read_text() == "two\n"


def test_where_git_cannot_say_what_the_launcher_wrote_stays_and_nothing_else(checkout, tmp_path, monkeypatch):
    code = tmp_path / "code"
    write_code_snapshot(code)
    commit = _commit(checkout)
    monkeypatch.setattr(code_snapshot, "_git", lambda *_: None)
    assert "as git saw it before this start" in write_code_snapshot(code)
    assert (code / "commit").read_text() == commit
    # Other code in another folder: that commit is not its own.
    monkeypatch.setattr(code_snapshot.phsa_megatron, "__file__", str(tmp_path / "site" / "__init__.py"))
    assert "installed in" in write_code_snapshot(code)
    assert [file.name for file in Path(code).iterdir()] == ["version"]
