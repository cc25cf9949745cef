"""The commands of docs/first_run.md do what the page says."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs" / "first_run.md").read_text(encoding="utf-8")


def blocks(section: str, language: str) -> list[str]:
    """Returns the code blocks of a language below one heading of the page."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def phsa_train(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command, *arguments = shlex.split(line, comments=True)
    assert command == "phsa-train", line
    paths = os.pathsep.join(str(CHECKOUT / folder) for folder in ("", "kernels", "launch"))
    return subprocess.run(
        [sys.executable, "-m", "phsa_megatron.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": paths},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )


@pytest.mark.slow
def test_the_first_run_leaves_what_the_page_lists(tmp_path):
    (commands,) = blocks("First run", "bash")
    for line in commands.splitlines():
        done = phsa_train(line, tmp_path)
        assert done.returncode == 0, done.stdout
    run = tmp_path / "runs" / "first"
    listed = re.findall(r"^- `([a-z.]+?)/?`", PAGE.split("`runs/first/` holds")[1], flags=re.MULTILINE)
    assert set(listed) >= {"report.html", "summary.json", "checkpoints", "config.yaml"}
    assert all((run / name).exists() for name in listed)
    assert json.loads((run / "summary.json").read_text())["steps"] == 30


def test_the_first_failures_answer_as_the_page_says(tmp_path):
    (console,) = blocks("First failure", "console")
    pairs = list(zip(*[iter(console.strip().splitlines())] * 2, strict=True))
    assert len(pairs) == 2
    for prompt, answer in pairs:
        done = phsa_train(prompt.removeprefix("$ "), tmp_path)
        assert done.returncode == 2, done.stdout
        assert answer.removesuffix(" ...") in done.stdout
