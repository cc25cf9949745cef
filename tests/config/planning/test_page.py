import shlex
from pathlib import Path

from phsa_megatron import cli
from phsa_megatron.config.planning.search import MOST_TOKENS

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "plan.md").read_text(encoding="utf-8")


def block(kind: str, after: str) -> str:
    return PAGE.split(after, 1)[1].split(f"```{kind}\n", 1)[1].split("```", 1)[0]


def test_the_example_is_what_its_command_prints(capsys, monkeypatch):
    columns, program, *arguments = shlex.split(block("bash", "## An example").replace("\\\n", " "))
    assert program == "phsa-train"
    monkeypatch.setenv(*columns.split("="))
    assert cli.main(arguments) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    shown = block("text", "## An example").rstrip().splitlines()
    assert len(shown) > 30
    assert printed[: len(shown)] == shown, "print the example of docs/plan.md anew"


def test_the_page_quotes_the_bound_of_the_search():
    assert f"{MOST_TOKENS:,} tokens" in PAGE.replace("\n", " ")
