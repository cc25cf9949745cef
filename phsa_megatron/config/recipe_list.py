"""Lists recipes and group files with the first comment line of each."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from phsa_megatron.config.compose import options
from phsa_megatron.config.recipes_path import recipes_dir as builtin_recipes_dir


def recipe_tables(recipes_dir: Path | None = None) -> list[Table]:
    """Return one table a group: the names that can be chosen and what they are."""
    folders = [builtin_recipes_dir(), *([] if recipes_dir is None else [recipes_dir])]
    tables = []
    for group, names in options(recipes_dir).items():
        table = Table()
        table.add_column(f"{group}=NAME", no_wrap=True)
        table.add_column("what it is", overflow="fold")
        for name in names:
            path = next(p for f in folders if (p := f / group / f"{name}.yaml").is_file())
            table.add_row(Text(name), Text(summary(path)))
        tables.append(table)
    return tables


def summary(path: Path) -> str:
    """Return the first comment of a recipe file that is not Hydra's package header."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
        if line and not line.startswith("#"):
            break
    return ""
