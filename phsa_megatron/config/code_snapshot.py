"""Records the code that a run runs: the commit it is based on, and every change since."""

from __future__ import annotations

import subprocess
from pathlib import Path

import phsa_megatron
from phsa_megatron.config.resolved import write_atomically


def write_code_snapshot(code_dir: Path) -> str:
    """Write what is needed to have this code again, and return it in one line.

    `commit` holds the commit, `changes.patch` what tracked files differ in (`git apply` restores it) and
    `untracked` the names of files that git does not know. An installed package has a version only. Where
    git cannot say, such as in a container, what was written of the same folder elsewhere stays.
    """
    code_dir.mkdir(parents=True, exist_ok=True)
    package = Path(phsa_megatron.__file__).resolve().parent
    version = f"phsa-megatron {phsa_megatron.__version__}\n{package}\n"
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        earlier = _text(code_dir / "commit")
        if earlier is not None and _text(code_dir / "version") == version:
            return f"commit {earlier.strip()[:12]}, in {package.parent}, as git saw it before this start"
        write_atomically(code_dir / "version", version)
        for name in ("commit", "changes.patch", "untracked"):
            (code_dir / name).unlink(missing_ok=True)
        return f"phsa-megatron {phsa_megatron.__version__}, installed in {package}"
    write_atomically(code_dir / "version", version)
    root = Path((_git(package, "rev-parse", "--show-toplevel") or str(package.parent)).strip())
    patch = _git(root, "diff", "--binary", "HEAD") or ""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard") or ""
    write_atomically(code_dir / "commit", commit)
    write_atomically(code_dir / "changes.patch", patch)
    write_atomically(code_dir / "untracked", untracked)
    changed = ", with changes" if patch or untracked else ""
    return f"commit {commit.strip()[:12]}{changed}, in {root}"


def current_commit() -> str | None:
    """Return the commit that this code is based on, or None where git cannot say."""
    commit = _git(Path(phsa_megatron.__file__).resolve().parent, "rev-parse", "HEAD")
    return None if commit is None else commit.strip()


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="surrogateescape"
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
