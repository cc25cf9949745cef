"""The page of needles by context length and depth, from its measured cells alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phsa_megatron.evaluation import needle_scores, plots
from phsa_megatron.evaluation.needle_scores import ENOUGH_TRIALS, Hits
from phsa_megatron.evaluation.needles import DEPTHS
from phsa_megatron.evaluation.page_parts import HOW_TO_GET, check_lines, keep_cells, origin, table, write
from phsa_megatron.evaluation.study_setup import read_cells

OTHERS = ("random_tokens", "mean_pool", "infllm_v2")
"""What phsa is compared with, trial by trial."""
LENGTHS_TOKENS = (1024, 2048, 4096, 8192)
"""Lengths of the study, as its commands name them."""
_HEAD = """\
# Needles in SmolLM2-135M with sparse attention it was not trained with

SmolLM2-135M-Instruct (weights dequantized from 4 bits) with its dense attention, and with the attention of
each recipe put in its place without training: `phsa`, mean pooling, InfLLM-V2, the random-token control and
the windows alone. One 7-digit number in the usual haystack of essays, the answer given up to the number; a
hit is all seven digits. Blocks of 16, init 16 + local 128 tokens, so that at k = 16 a query sees at most 400
tokens.

Two readings: with prefill = dense the text before the question is read with dense attention and the question
and the answer with the selector; with prefill = sparse everything is read with the selector.

Written by `phsa-train selector-study lengths-page` from the measured cells; the numbers are in `{name}.json`,
and every trial in `{name}_cells` (`xz -d` it into `--out` to go on from there). To reproduce:

```bash
{how_to_get}only="--texts essays --tokens 1024 2048 4096 8192"
only="$only --selectors dense window phsa mean_pool infllm_v2 random_tokens"
phsa-train selector-study needles $with $only --out runs/lengths --trials 250
phsa-train selector-study needles $with $only --out runs/lengths --trials 50 --prefill sparse
phsa-train selector-study check --out runs/lengths --against runs/fp32  # see selectors.md
phsa-train selector-study lengths-page --out runs/lengths --page docs/results/smollm2_needles
```
"""

ByLength = dict[int, Hits]


def write_lengths_page(cells_dir: Path, page: Path) -> str:
    """Write PAGE.md, PAGE.json and PAGE_*.png, and return what was written.

    Args:
        cells_dir: folder of needles.jsonl.
        page: path without its ending.
    """
    cells = read_cells(cells_dir / "needles.jsonl")
    by_prefill: dict[str, ByLength] = {}
    for (prefill, _, tokens), hits in sorted(needle_scores.hits_of(cells).items(), key=lambda x: x[0][2]):
        by_prefill.setdefault(prefill, {})[tokens] = hits
    parts = [_HEAD.format(name=page.name, how_to_get=HOW_TO_GET)]
    if cells:
        parts += [
            origin(cells),
            "## Does punctuation beat its control?\n",
            "A length counts where both selectors have at least "
            f"{ENOUGH_TRIALS} common trials at every k; cells with fewer are shown with their number.\n",
            *(line for prefill, lengths in by_prefill.items() for line in _gap_lines(prefill, lengths)),
            *(line for prefill, lengths in by_prefill.items() for line in _verdicts(prefill, lengths)),
        ]
    for prefill, lengths in by_prefill.items():
        parts += _part(prefill, lengths, page)
    parts += check_lines(cells_dir)
    write(page, parts, _content(by_prefill))
    keep_cells(page, {"needles": cells_dir / "needles.jsonl"})
    return f"written: {page}.md and .json, {len(cells)} cells"


def _content(by_prefill: Mapping[str, ByLength]) -> list[dict[str, Any]]:
    return [
        {"prefill": prefill, "num_tokens": tokens, "depth_frac": depth, "selector": s, "topk": k}
        | {"hits": sum(here.values()), "trials": len(here)}
        for prefill, lengths in by_prefill.items()
        for tokens, hits in lengths.items()
        for (s, k), trials in hits.items()
        for depth in DEPTHS
        for here in [needle_scores.at_depth(trials, depth)]
    ]


def _gap_lines(prefill: str, lengths: ByLength) -> list[str]:
    """Return what is missing, or has fewer trials than the rest."""
    expected = {cell for hits in lengths.values() for cell in hits}
    missing = needle_scores.gaps({f"{tokens:,} tokens": hits for tokens, hits in lengths.items()}, expected)
    missing += [f"{tokens:,} tokens: not measured" for tokens in LENGTHS_TOKENS if tokens not in lengths]
    return [f"Not complete, prefill = {prefill}: {'; '.join(missing)}.\n"] if missing else []


def _topks(lengths: ByLength) -> list[int]:
    return sorted({k for hits in lengths.values() for _, k in hits if k})


def _verdicts(prefill: str, lengths: ByLength) -> list[str]:
    """Return, for each rival, a sentence over all lengths and a table by length and k."""
    topks, lines = _topks(lengths), []
    rows = []
    for other in OTHERS:
        total = needle_scores.difference(list(lengths.values()), "phsa", other, topks)
        if total is None:
            continue
        lines.append(
            (
                f"- prefill = {prefill}: `phsa` {total.verdict} than `{other}`: {total}"
                if total.verdict != "no difference is shown"
                else f"- prefill = {prefill}: between `phsa` and `{other}` {total.verdict}: {total}"
            )
            + f", {total.num_trials} trials of {total.num_places} lengths"
        )
        for tokens, hits in lengths.items():
            by_k = [needle_scores.difference([hits], "phsa", other, [k]) for k in topks]
            rows.append([other, f"{tokens:,}", *("-" if d is None else str(d) for d in by_k)])
    if not rows:
        return []
    return [
        *lines,
        "",
        f"`phsa` minus the other, share found, prefill = {prefill}, with a 95% interval over trials "
        "(bootstrap; above: mean over k and lengths; each comparison by itself, not corrected for their "
        "number):\n",
        table(["minus", "tokens", *(f"k = {k}" for k in topks)], rows),
    ]


def _part(prefill: str, lengths: ByLength, page: Path) -> list[str]:
    topks = _topks(lengths)
    cells_of_all = [trials for hits in lengths.values() for trials in hits.values()]
    by_depth = [needle_scores.at_depth(trials, depth) for trials in cells_of_all for depth in DEPTHS]
    names = list(dict.fromkeys(s for hits in lengths.values() for s, _ in hits))
    rows = []
    for selector in names:
        ks = [k for k in topks if any((selector, k) in hits for hits in lengths.values())] or [0]
        for k in ks:
            cells = [needle_scores.with_interval(hits.get((selector, k))) for hits in lengths.values()]
            rows.append([selector, str(k) if k else "", *cells])
    few = any(len(trials) < ENOUGH_TRIALS for trials in cells_of_all)
    figure = f"{page.name}_{prefill}.png"
    _maps(page.with_name(figure), prefill, lengths, names)
    return [
        f"## prefill = {prefill}\n",
        "Hits of trials over five depths, with 95% intervals (Wilson):\n",
        *([f"Cells of fewer than {ENOUGH_TRIALS} trials are a first look: no conclusion uses them.\n"] * few),
        table(["selector", "k", *(f"{tokens:,} tokens" for tokens in lengths)], rows),
        f"By depth and length, {needle_scores.trials_of(by_depth)} trials a cell:\n",
        f"![share found by depth and length]({figure})\n",
    ]


def _maps(path: Path, prefill: str, lengths: ByLength, names: list[str]) -> None:
    panels = {}
    for row, selector in enumerate(names):
        topks = sorted({k for hits in lengths.values() for s, k in hits if s == selector})
        for column, k in enumerate(topks):
            values = []
            for depth in DEPTHS:
                here = [
                    needle_scores.at_depth(hits.get((selector, k), {}), depth) for hits in lengths.values()
                ]
                values.append([needle_scores.share(cell) if cell else math.nan for cell in here])
            panels[row, column] = f"{selector}, k = {k}" if k else selector, values
    plots.heat_maps(
        path,
        panels,
        columns=[f"{tokens // 1024}k" for tokens in lengths],
        rows=[f"{depth:.1f}" for depth in DEPTHS],
        title=f"share of needles found, prefill = {prefill}",
        x_label="tokens of the prompt",
        y_label="depth of the needle",
    )
