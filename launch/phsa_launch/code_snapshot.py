"""Records the code that a job runs: the commit it is based on, and every change since."""

from __future__ import annotations

import subprocess
from pathlib import Path

import phsa_megatron
from phsa_megatron.config.resolved import write_atomically


def write_code_snapshot(code_dir: Path) -> str:
    """Write what is needed to have this code again, and return it in one line.

    `commit` holds the commit, `changes.patch` what tracked files differ in (`git apply` restores it) and
    `untracked` the names of files that git does not know. An installed package has a version only.
    """
    code_dir.mkdir(parents=True, exist_ok=True)
    package = Path(phsa_megatron.__file__).resolve().parent
    write_atomically(code_dir / "version", f"phsa-megatron {phsa_megatron.__version__}\n{package}\n")
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(package, "rev-parse", "HEAD")
    if tracked is None or commit is None:
        for name in ("commit", "changes.patch", "untracked"):
            (code_dir / name).unlink(missing_ok=True)
        return f"phsa-megatron {phsa_megatron.__version__}, installed in {package}"
    root = Path((_git(package, "rev-parse", "--show-toplevel") or str(package.parent)).strip())
    patch = _git(root, "diff", "--binary", "HEAD") or ""
    untracked = _git(root, "ls-files", "--others", "--exclude-standard") or ""
    write_atomically(code_dir / "commit", commit)
    write_atomically(code_dir / "changes.patch", patch)
    write_atomically(code_dir / "untracked", untracked)
    changed = ", with changes" if patch or untracked else ""
    return f"commit {commit.strip()[:12]}{changed}, in {root}"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="surrogateescape"
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
