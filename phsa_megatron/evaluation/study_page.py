"""The page of the selector study, from its measured cells alone: nothing in it is written by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from phsa_megatron.evaluation import needle_scores, plots
from phsa_megatron.evaluation.needle_scores import CONTROLS, ENOUGH_TRIALS, Hits, Where
from phsa_megatron.evaluation.page_parts import (
    HOW_TO_GET,
    check_lines,
    mean_and_spread,
    origin,
    table,
    write,
)
from phsa_megatron.evaluation.study_setup import read_cells
from phsa_megatron.evaluation.study_texts import TEXTS

_HEAD = """\
# Selectors on a small real model

SmolLM2-135M-Instruct, dense-trained and never trained with any of these selectors (weights dequantized from
4 bits). What follows says how well a selector finds what a dense model looks at. It does not say what a model
trained with it would do, and one small model is no verdict.

Written by `phsa-train selector-study page` from the measured cells; the numbers are in `{name}.json`. To
reproduce:

```bash
{how_to_get}phsa-train selector-study mass    $with --out runs/study
phsa-train selector-study needles $with --out runs/study
phsa-train selector-study needles $with --out runs/study --prefill sparse
phsa-train selector-study check   $with --out runs/study --texts essays
phsa-train selector-study page    --out runs/study --page docs/results/selectors
```

All go on where they were stopped; `--device cpu` measures the same, slowly. Names are recipes of
`attention=`; `kernels/README.md` has their formulas. Blocks of 16; the punctuation set is `exact`, English,
and English with Chinese on the Chinese text. NSA has weights of its own and cannot be had without training.
Texts: {texts}.
"""

Gains = dict[str, dict[int, dict[str, float]]]
"""Share of the oracle's gain by selector, k and text, the mean over its documents."""


def write_page(cells_dir: Path, page: Path) -> str:
    """Write PAGE.md, PAGE.json and PAGE_*.png, and return what was written.

    Args:
        cells_dir: folder of needles.jsonl and mass.jsonl; either may be missing.
        page: path without its ending.
    """
    needles, mass = (read_cells(cells_dir / f"{name}.jsonl") for name in ("needles", "mass"))
    page.parent.mkdir(parents=True, exist_ok=True)
    texts = "; ".join(f"*{name}*, {about}" for name, (_, about) in TEXTS.items())
    parts = [_HEAD.format(name=page.name, texts=texts, how_to_get=HOW_TO_GET)]
    content: dict[str, Any] = {}
    gains, found = gains_of(mass), needle_scores.hits_of(needles)
    parts += _conclusion(gains, found)
    if mass:
        parts += _mass_part(mass, gains, page)
        content["mass"] = [{k: v for k, v in cell.items() if k != "gain_by_layer"} for cell in mass]
    if needles:
        parts += _needle_part(needles, found, page)
        content["needles"] = [
            {"prefill": p, "text": t, "num_tokens": n, "selector": s, "topk": k}
            | {"hits": sum(trials.values()), "trials": len(trials)}
            for (p, t, n), hits in found.items()
            for (s, k), trials in hits.items()
        ]
    parts += check_lines(cells_dir)
    write(page, parts, content)
    return f"written: {page}.md and .json, {len(mass)} cells of mass, {len(needles)} of needles"


# What it says


def _conclusion(gains: Gains, found: dict[Where, Hits]) -> list[str]:
    lines = []
    for control in CONTROLS:
        says = []
        if "phsa" in gains and control in gains:
            says.append(_mass_verdict(gains, control))
        for prefill, places in _by_prefill(found).items():
            difference = needle_scores.difference(
                list(places.values()), "phsa", control, _topks(list(places.values()))
            )
            if difference:
                says.append(f"needles, prefill = {prefill}: {difference.verdict}, {difference}")
        if says:
            lines.append(f"- `phsa` against `{control}`: {'; '.join(says)}")
    if not lines:
        return []
    ranking = _ranking(gains, found)
    return [
        "## Punctuation against its controls\n",
        "`random_tokens`, `last_token`, `max_norm`, `shuffled` and `separators` put other tokens in the "
        "place of punctuation; `mean_pool` puts nothing there. Attention mass: share of the oracle's gain, "
        "mean over k. Needles: difference in the share found, mean over k and texts, with a 95% interval "
        "over trials (bootstrap; each comparison by itself, not corrected for their number).\n",
        *lines,
        "",
        "All selectors, mean over k and texts ± standard deviation over texts.\n",
        *ranking,
    ]


def _mass_verdict(gains: Gains, control: str) -> str:
    texts = [t for t in _texts(gains) if all(t in gains[s][k] for s in ("phsa", control) for k in gains[s])]
    by_text = [
        mean(gains["phsa"][k][t] - gains[control][k][t] for k in gains["phsa"] if k in gains[control])
        for t in texts
    ]
    less = sum(d < 0 for d in by_text)
    return (
        f"attention mass {mean(by_text):+.3f} (from {min(by_text):+.3f} to {max(by_text):+.3f} over texts), "
        f"less in {less} of {len(by_text)} texts"
    )


def _ranking(gains: Gains, found: dict[Where, Hits]) -> list[str]:
    columns: dict[str, dict[str, list[float]]] = {}
    if gains:
        columns["attention mass"] = {
            s: [mean(by_k[k][t] for k in by_k) for t in _texts(gains) if all(t in v for v in by_k.values())]
            for s, by_k in gains.items()
        }
    for prefill, places in _by_prefill(found).items():
        topks = _topks(list(places.values()))
        scores: dict[str, list[float]] = defaultdict(list)
        for hits in places.values():
            for selector in dict.fromkeys(s for s, _ in hits):
                cells = [needle_scores.at_k(hits, selector, k) for k in topks]
                measured = [needle_scores.share(cell) for cell in cells if cell]
                if len(measured) == len(topks):
                    scores[selector].append(mean(measured))
        columns[f"needles, prefill = {prefill}"] = scores
    first = columns[next(reversed(columns))]
    names = sorted(
        dict.fromkeys(s for scores in columns.values() for s in scores),
        key=lambda s: -mean(first[s]) if first.get(s) else 1.0,
    )
    rows = [[s, *(mean_and_spread(scores.get(s, [])) for scores in columns.values())] for s in names]
    lines = [table(["selector", *columns], rows)]
    mass = columns.get("attention mass", {})
    for title, scores in columns.items():
        both = [s for s in mass if scores.get(s) and mass[s]]
        if title != "attention mass" and len(both) > 2:
            value = needle_scores.rank_correlation(*([mean(x[s]) for s in both] for x in (mass, scores)))
            lines.append(
                f"Rank correlation (Spearman) of attention mass with {title}, over {len(both)} selectors: "
                f"{value:+.2f}.\n"
            )
    return lines


# Mass


def gains_of(cells: list[dict[str, Any]]) -> Gains:
    """Return the share of the oracle's gain that each selector recovers."""
    values: dict[tuple[str, int, str], list[float]] = defaultdict(list)
    for cell in cells:
        if cell["topk"]:
            values[cell["selector"], cell["topk"], cell["text"]].append(cell["oracle_gain_frac"])
    gains: Gains = {}
    for (selector, topk, text), shares in values.items():
        gains.setdefault(selector, {}).setdefault(topk, {})[text] = mean(shares)
    return gains


def _texts(gains: Gains) -> list[str]:
    return list(dict.fromkeys(t for by_k in gains.values() for by_text in by_k.values() for t in by_text))


def _mass_part(cells: list[dict[str, Any]], gains: Gains, page: Path) -> list[str]:
    texts = _texts(gains)
    topks = sorted({k for by_k in gains.values() for k in by_k})
    documents = len({cell["document"] for cell in cells})

    def shares(selector: str, topk: int, text: str, key: str) -> str:
        own = [c[key] for c in cells if (c["selector"], c["topk"], c["text"]) == (selector, topk, text)]
        return f"{mean(own):.4f}" if own else "-"

    rows = [
        [s, *(mean_and_spread(list(by_k[k].values())) if k in by_k else "-" for k in topks)]
        for s, by_k in gains.items()
    ]
    columns = [(t, k) for t in texts for k in (2, 16) if k in topks]
    kept = [[s, *(shares(s, k, t, "kept_mass_frac") for t, k in columns)] for s in gains]
    first = next(iter(gains))
    kept.append(["oracle", *(shares(first, k, t, "oracle_mass_frac") for t, k in columns)])
    plots.curves(
        page.with_name(f"{page.name}_mass.png"),
        {s: {k: mean(v.values()) for k, v in sorted(by_k.items())} for s, by_k in gains.items()},
        title=f"share of the oracle's gain over the window, mean over {len(texts)} texts",
        x_label="selected blocks (k)",
        y_label="share",
    )
    windows = ", ".join(f"{t} {shares('window', 0, t, 'window_mass_frac')}" for t in texts)
    return [
        "## Attention mass\n",
        f"{documents} documents of 8,192 tokens of each text, init 128 + local 512, {cells[0]['rows']} query "
        f"rows x 30 layers x 9 heads. The windows alone keep: {windows}. An oracle takes the k blocks with "
        "the most true mass; this is the share of its gain over the windows that a selector recovers, over "
        f"queries with a choice (mean ± standard deviation over {len(texts)} texts: {', '.join(texts)}). "
        "`moba` chooses for each query head and is held to an oracle that does so too.\n",
        origin(cells),
        table(["selector", *(f"k = {k}" for k in topks)], rows),
        f"![share of the oracle's gain]({page.name}_mass.png)\n",
        "Share of the dense attention mass that is kept, windows included:\n",
        table(["selector", *(f"{t}, k = {k}" for t, k in columns)], kept),
    ]


# Needles


def _by_prefill(found: dict[Where, Hits]) -> dict[str, dict[str, Hits]]:
    """Return hits by prefill and by text (and length, if there are several)."""
    lengths = {tokens for _, _, tokens in found}
    by_prefill: dict[str, dict[str, Hits]] = {}
    for (prefill, text, tokens), hits in found.items():
        name = text if len(lengths) == 1 else f"{text}, {tokens:,} tokens"
        by_prefill.setdefault(prefill, {})[name] = hits
    return by_prefill


def _topks(places: list[Hits]) -> list[int]:
    return sorted({k for hits in places for _, k in hits if k})


def _needle_part(cells: list[dict[str, Any]], found: dict[Where, Hits], page: Path) -> list[str]:
    lengths = ", ".join(f"{n:,}" for n in sorted({n for _, _, n in found}))
    parts = [
        "## Needles\n",
        f"One 7-digit number in {lengths} tokens at five depths, init 16 + local 128, the answer given up to "
        "the number; a hit is all seven digits. The text before the question is read with dense attention "
        "(prefill = dense) or with the selector (sparse), the question and the answer with the selector; all "
        "selectors see the same trials.\n",
        origin(cells),
    ]
    for prefill, places in _by_prefill(found).items():
        topks = _topks(list(places.values()))
        names = list(dict.fromkeys(s for hits in places.values() for s, _ in hits))
        shares = {s: {k: _shares(places, s, k) for k in topks} for s in names}
        parts += [
            f"### prefill = {prefill}\n",
            f"Share found, mean ± standard deviation over {len(places)} texts ({', '.join(places)}):\n",
            table(
                ["selector", *(f"k = {k}" for k in topks)],
                [[s, *(mean_and_spread(by_k[k]) for k in topks)] for s, by_k in shares.items()],
            ),
            _needle_plot(page, prefill, shares, len(places)),
            *_pairs(places, topks),
        ]
        for name, hits in places.items():
            parts += _needles_of_text(name, prefill, hits, topks)
    return parts


def _shares(places: Mapping[str, Hits], selector: str, topk: int) -> list[float]:
    cells = [needle_scores.at_k(hits, selector, topk) for hits in places.values()]
    return [needle_scores.share(cell) for cell in cells if cell]


def _needle_plot(page: Path, prefill: str, shares: dict[str, dict[int, list[float]]], texts: int) -> str:
    name = f"{page.name}_needles_{prefill}.png"
    flat = {s: mean(next(iter(by_k.values()))) for s, by_k in shares.items() if s in ("dense", "window")}
    plots.curves(
        page.with_name(name),
        {s: {k: mean(v) for k, v in by_k.items() if v} for s, by_k in shares.items() if s not in flat},
        title=f"needles found, prefill = {prefill}, mean over {texts} texts",
        x_label="selected blocks (k)",
        y_label="share of trials",
        levels=flat,
    )
    return f"![needles found]({name})\n"


def _pairs(places: Mapping[str, Hits], topks: list[int]) -> list[str]:
    """Return the table of phsa against its controls, by k."""
    rows = []
    for control in CONTROLS:
        over_all = needle_scores.difference(list(places.values()), "phsa", control, topks)
        if over_all:
            by_k = [needle_scores.difference(list(places.values()), "phsa", control, [k]) for k in topks]
            rows.append([control, *("-" if d is None else str(d) for d in by_k), f"{over_all}"])
    if not rows:
        return []
    about = "`phsa` minus its control, share found, all texts, with a 95% interval over trials:\n"
    return [about, table(["control", *(f"k = {k}" for k in topks), "mean over k"], rows)]


def _needles_of_text(name: str, prefill: str, hits: Hits, topks: list[int]) -> list[str]:
    fewest = needle_scores.fewest_trials(hits)
    rows = [
        [s, *(needle_scores.with_interval(needle_scores.at_k(hits, s, k)) for k in topks)]
        for s in dict.fromkeys(s for s, _ in hits)
    ]
    few = [f"Fewer than {ENOUGH_TRIALS} trials: a first look, not a result.\n"]
    return [
        f"#### {name}, prefill = {prefill}: {fewest} trials a cell\n",
        *(few if fewest < ENOUGH_TRIALS else []),
        table(["selector", *(f"k = {k}" for k in topks)], rows),
    ]
