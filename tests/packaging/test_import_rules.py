"""The import rules of ARCHITECTURE.md hold, and a planted violation breaks them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("phsa_megatron", "kernels", "launch")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(root / p) for p in (".", "kernels", "launch")),
        "PYTHONSAFEPATH": "1",
    }
    program = "from importlinter.cli import lint_imports_command as main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=root, env=env, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in CODE:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_rules_hold(checkout: Path) -> None:
    result = lint_imports(checkout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        ("kernels/phsa_kernels/reference.py", "import phsa_megatron.config.schema"),
        ("phsa_megatron/config/schema.py", "import torch"),
        ("launch/phsa_launch/__init__.py", "import phsa_megatron.data.tokenizer"),
        ("phsa_megatron/model/factory.py", "import phsa_kernels"),
        ("phsa_megatron/config/errors.py", "import phsa_megatron.parallel.groups"),
        ("phsa_megatron/data/tokenizer.py", "import phsa_megatron.training.loop"),
    ],
)
def test_a_planted_violation_breaks_the_build(checkout: Path, file: str, planted: str) -> None:
    path = checkout / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{planted}\n", encoding="utf-8")
    result = lint_imports(checkout)
    assert result.returncode != 0 and "BROKEN" in result.stdout, result.stdout + result.stderr
