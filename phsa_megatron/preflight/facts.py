"""What must be equal on all nodes: versions of Python, libraries and driver, and this project's own code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import phsa_megatron
from phsa_megatron.preflight.gpus import driver_version

_PACKAGES = ("torch", "megatron-core", "triton", "numpy", "transformer-engine")


def collect() -> dict[str, str]:
    """The versions of this node, by name."""
    facts = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "none"
    facts["driver"] = driver_version()
    facts["phsa-megatron"] = f"{phsa_megatron.__version__}, commit {_commit()}, source {_source_hash()}"
    return facts


def _root() -> Path:
    return Path(phsa_megatron.__file__).resolve().parent


def _commit() -> str:
    """The commit of the checkout that runs, `none` outside of one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_root()), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"


def _source_hash() -> str:
    """A hash over the package's Python files: a commit does not tell of changes that are not committed."""
    digest = hashlib.sha256()
    for path in sorted(_root().rglob("*.py")):
        digest.update(path.relative_to(_root()).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
