"""Files and functions stay small enough to read; names that say nothing are refused."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
NAMES_THAT_SAY_NOTHING = {"utils", "common", "helpers", "misc", "util", "helper"}


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).exists()]


PYTHON_FILES = tracked("*.py")
PRODUCT_FILES = [f for f in PYTHON_FILES if "tests" not in f.relative_to(ROOT).parts]


def too_long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body
            docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            start = body[0].end_lineno if docstring else node.lineno
            lines = (node.end_lineno or 0) - (start or 0)
            is_kernel = any("triton" in ast.unparse(d) for d in node.decorator_list)
            if lines > (MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES):
                found.append(f"{node.name}: {lines} lines")
    return found


def test_there_are_files_to_check() -> None:
    assert len(PRODUCT_FILES) > 10


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_is_within_the_line_budget(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{path.name} has {lines} lines; split it into rooms"


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_within_the_line_budget(path: Path) -> None:
    assert not too_long_functions(path.read_text(encoding="utf-8"))


def test_function_budget_notices_a_long_function() -> None:
    body = "\n".join(f"    x = {i}" for i in range(MAX_FUNCTION_LINES + 1))
    assert too_long_functions(f"def f():\n{body}\n") == [f"f: {MAX_FUNCTION_LINES + 1} lines"]


def test_modules_are_named_after_their_idea() -> None:
    assert not [f for f in PRODUCT_FILES if f.stem in NAMES_THAT_SAY_NOTHING]


def test_no_implementation_in_package_files() -> None:
    for path in PRODUCT_FILES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)], path


def test_rooms_outside_the_packages_are_no_packages() -> None:
    """`kernels/__init__.py` would shadow Hugging Face's `kernels`; the others would enter site-packages."""
    for room in ("kernels", "launch", "recipes", "tests"):
        assert not (ROOT / room / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_recipes_hold_no_python() -> None:
    assert not tracked("recipes/*.py", "recipes/**/*.py")


def test_nothing_unfinished_is_left_behind() -> None:
    for path in PRODUCT_FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert "TODO" not in line and "FIXME" not in line, f"{path}:{number}"
