"""The page of the selector study, from its measured cells alone: nothing in it is written by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from phsa_megatron.evaluation import needle_scores, plots
from phsa_megatron.evaluation.needle_scores import ENOUGH_TRIALS, Hits, Where
from phsa_megatron.evaluation.needle_verdicts import groups_of, needle_verdicts, pair_tables
from phsa_megatron.evaluation.page_parts import (
    HOW_TO_GET,
    check_lines,
    keep_cells,
    mean_and_spread,
    origin,
    table,
    write,
)
from phsa_megatron.evaluation.study_setup import read_cells
from phsa_megatron.evaluation.study_texts import TEXTS
from phsa_megatron.evaluation.study_why import blocks_part, lambda_part

_HEAD = """\
# Selectors on a small real model

SmolLM2-135M-Instruct, dense-trained and never trained with any of these selectors (weights dequantized from
4 bits). What follows says how well a selector finds what a dense model looks at. It does not say what a model
trained with it would do, and one small model is no verdict.

Written by `phsa-train selector-study page` from the measured cells; the numbers are in `{name}.json`, and
every needle trial in `{name}_cells` (`xz -d` them into `--out` to go on from there). To reproduce:

```bash
{how_to_get}phsa-train selector-study mass    $with --out runs/study
phsa-train selector-study needles $with --out runs/study
phsa-train selector-study needles $with --out runs/study --prefill sparse
phsa-train selector-study blocks  $with --out runs/study --trials 50
other="--device cpu --dtype float32 --texts essays"
phsa-train selector-study needles $with $other --out runs/fp32 --trials 10 --topk 1 8
phsa-train selector-study check   --out runs/study --against runs/fp32
lambdas="mean_pool phsa random_tokens phsa@0 phsa@0.25 phsa@0.75 random_tokens@0 random_tokens@0.75"
phsa-train selector-study needles $with $other --out runs/lambdas --tokens 1024 --topk 2 --selectors $lambdas
phsa-train selector-study page    --out runs/study --lambdas runs/lambdas --page docs/results/selectors
```

All go on where they were stopped; `--device cpu` measures the same, slowly. Names are recipes of
`attention=`; `kernels/README.md` has their formulas. Blocks of 16; the punctuation set is `exact`, English,
and English with Chinese on the Chinese text. NSA has weights of its own and cannot be had without training.
Texts: {texts}.
"""

Gains = dict[str, dict[int, dict[str, float]]]
"""Share of the oracle's gain by selector, k and text, the mean over its documents."""


def write_page(cells_dir: Path, page: Path, lambdas_dir: Path | None = None) -> str:
    """Write PAGE.md, PAGE.json and PAGE_*.png, and return what was written.

    Args:
        cells_dir: folder of needles.jsonl and mass.jsonl, blocks.json and check.json; any may be missing.
        page: path without its ending.
        lambdas_dir: folder of the needles.jsonl with other lambdas, or None.
    """
    needles, mass = (read_cells(cells_dir / f"{name}.jsonl") for name in ("needles", "mass"))
    lambdas = read_cells(lambdas_dir / "needles.jsonl") if lambdas_dir else []
    page.parent.mkdir(parents=True, exist_ok=True)
    texts = "; ".join(f"*{name}*, {about}" for name, (_, about) in TEXTS.items())
    parts = [_HEAD.format(name=page.name, texts=texts, how_to_get=HOW_TO_GET)]
    content: dict[str, Any] = {}
    gains, found = gains_of(mass), needle_scores.hits_of(needles)
    parts += _conclusion(mass, gains, found)
    if lambdas:
        parts += lambda_part(lambdas)
        content["lambdas"] = _counts(needle_scores.hits_of(lambdas))
    if needles:
        parts += blocks_part(cells_dir / "blocks.json", needles)
    if mass:
        parts += _mass_part(mass, gains, page)
        content["mass"] = [{k: v for k, v in cell.items() if k != "gain_by_layer"} for cell in mass]
    if needles:
        parts += _needle_part(needles, found, page)
        content["needles"] = _counts(found)
    parts += check_lines(cells_dir)
    write(page, parts, content)
    files = {"needles": cells_dir / "needles.jsonl"}
    keep_cells(page, files | ({"lambdas": lambdas_dir / "needles.jsonl"} if lambdas_dir else {}))
    return f"written: {page}.md and .json, {len(mass)} cells of mass, {len(needles)} of needles"


def _counts(found: dict[Where, Hits]) -> list[dict[str, Any]]:
    return [
        {"prefill": p, "text": t, "num_tokens": n, "selector": s, "topk": k}
        | {"hits": sum(trials.values()), "trials": len(trials)}
        for (p, t, n), hits in found.items()
        for (s, k), trials in hits.items()
    ]


# What it says


def _conclusion(mass: list[dict[str, Any]], gains: Gains, found: dict[Where, Hits]) -> list[str]:
    lines = []
    if "phsa" in gains:
        for about, texts in groups_of({t: {} for t in _texts(gains)}).items():
            documents = ", ".join(f"{t} {_documents(mass, t)}" for t in texts)
            lines.append(f"**Attention mass, {about} (documents: {documents})**\n")
            rivals = [s for s in gains if s != "phsa" and not s.endswith("_phsa")]
            lines += [f"- `phsa` against `{s}`: {_mass_verdict(gains, s, list(texts))}" for s in rivals]
            lines.append("")
    for prefill, places in _by_prefill(found).items():
        lines += needle_verdicts(prefill, places, _topks(list(places.values())))
    if not lines:
        return []
    return [
        "## Does punctuation beat what stands in its place?\n",
        "`random_tokens`, `last_token`, `max_norm`, `shuffled` and `separators` put other tokens in the "
        "place of punctuation; `mean_pool` puts nothing there; `halves_phsa`, `cumulant_phsa` and "
        "`minmax_phsa` add punctuation to another pool. Attention mass: share of the oracle's gain, mean "
        "over k. Needles: difference in the share found, mean over k and texts, with a 95% interval over "
        "trials (bootstrap; each comparison by itself, not corrected for their number). A text counts where "
        f"both selectors have at least {ENOUGH_TRIALS} common trials at every k.\n",
        *lines,
        *_gap_lines(found),
        "All selectors, mean over k and texts ± standard deviation over texts, over the texts in which all "
        "of them are measured at every k.\n",
        *_ranking(gains, found),
    ]


def _documents(mass: list[dict[str, Any]], text: str) -> int:
    return len({cell["document"] for cell in mass if cell["text"] == text})


def _gap_lines(found: dict[Where, Hits]) -> list[str]:
    """Return what the needle cells lack, by prefill."""
    expected = _expected(found)
    lines = []
    for prefill, places in _by_prefill(found).items():
        missing = needle_scores.gaps(places, expected)
        missing += [f"{t}: not measured" for t in TEXTS if not any(p.split(",")[0] == t for p in places)]
        if missing:
            lines.append(f"Needles, prefill = {prefill}, not complete: {'; '.join(missing)}.\n")
    return lines


def _expected(found: dict[Where, Hits]) -> set[tuple[str, int]]:
    """Return the selectors and k that have been measured anywhere."""
    return {cell for hits in found.values() for cell in hits}


def _complete(places: dict[str, Hits], found: dict[Where, Hits]) -> dict[str, Hits]:
    return {t: hits for t, hits in places.items() if needle_scores.is_complete(hits, _expected(found))}


def _mass_verdict(gains: Gains, rival: str, texts: list[str]) -> str:
    topks = [k for k in gains["phsa"] if k in gains[rival]]
    both = [t for t in texts if all(t in gains[s][k] for s in ("phsa", rival) for k in topks)]
    by_text = [mean(gains["phsa"][k][t] - gains[rival][k][t] for k in topks) for t in both]
    less = sum(d < 0 for d in by_text)
    spread = f" (from {min(by_text):+.3f} to {max(by_text):+.3f} over texts)" if len(by_text) > 1 else ""
    return f"{mean(by_text):+.3f}{spread}, less in {less} of {len(by_text)} texts"


def _ranking(gains: Gains, found: dict[Where, Hits]) -> list[str]:
    columns: dict[str, dict[str, list[float]]] = {}
    if gains:
        columns["attention mass"] = {
            s: [mean(by_k[k][t] for k in by_k) for t in _texts(gains) if all(t in v for v in by_k.values())]
            for s, by_k in gains.items()
        }
    for prefill, places in _by_prefill(found).items():
        topks, complete = _topks(list(places.values())), _complete(places, found)
        if complete:
            columns[f"needles, prefill = {prefill} ({', '.join(complete)})"] = {
                s: [mean(_shares({t: hits}, s, k)[0] for k in topks) for t, hits in complete.items()]
                for s in dict.fromkeys(s for s, _ in next(iter(complete.values())))
            }
    if not columns:
        return []
    names = list(dict.fromkeys(s for scores in columns.values() for s in scores))
    first = columns[list(columns)[min(1, len(columns) - 1)]]
    names.sort(key=lambda s: -mean(first[s]) if first.get(s) else 1.0)
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
    documents = ", ".join(f"{t} {_documents(cells, t)}" for t in texts)
    absent = [t for t in TEXTS if t not in texts]

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
        f"Documents of 8,192 tokens: {documents}; texts without: {', '.join(absent) or 'none'}. Init 128 + "
        f"local 512, {cells[0]['rows']} query rows x 30 layers x 9 heads. The windows alone keep: {windows}. "
        "An oracle takes the k blocks with the most true mass; this is the share of its gain over the "
        "windows that a selector recovers, over queries with a choice (mean ± standard deviation over "
        f"{len(texts)} texts: {', '.join(texts)}). "
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
        complete = _complete(places, found)
        parts.append(f"### prefill = {prefill}\n")
        if complete:
            names = list(dict.fromkeys(s for hits in complete.values() for s, _ in hits))
            shares = {s: {k: _shares(complete, s, k) for k in topks} for s in names}
            parts += [
                f"Share found, mean ± standard deviation, over the complete texts ({', '.join(complete)}):\n",
                table(
                    ["selector", *(f"k = {k}" for k in topks)],
                    [[s, *(mean_and_spread(by_k[k]) for k in topks)] for s, by_k in shares.items()],
                ),
                _needle_plot(page, prefill, shares, list(complete)),
            ]
        parts += pair_tables(places, topks)
        for name, hits in places.items():
            parts += _needles_of_text(name, prefill, hits, topks)
    return parts


def _shares(places: Mapping[str, Hits], selector: str, topk: int) -> list[float]:
    cells = [needle_scores.at_k(hits, selector, topk) for hits in places.values()]
    return [needle_scores.share(cell) for cell in cells if cell]


def _needle_plot(
    page: Path, prefill: str, shares: dict[str, dict[int, list[float]]], texts: list[str]
) -> str:
    name = f"{page.name}_needles_{prefill}.png"
    flat = {s: mean(next(iter(by_k.values()))) for s, by_k in shares.items() if s in ("dense", "window")}
    plots.curves(
        page.with_name(name),
        {s: {k: mean(v) for k, v in by_k.items() if v} for s, by_k in shares.items() if s not in flat},
        title=f"needles found, prefill = {prefill}: {', '.join(texts)}",
        x_label="selected blocks (k)",
        y_label="share of trials",
        levels=flat,
    )
    return f"![needles found]({name})\n"


def _needles_of_text(name: str, prefill: str, hits: Hits, topks: list[int]) -> list[str]:
    rows = [
        [s, *(needle_scores.with_interval(needle_scores.at_k(hits, s, k)) for k in topks)]
        for s in dict.fromkeys(s for s, _ in hits)
    ]
    few = any(len(trials) < ENOUGH_TRIALS for trials in hits.values())
    return [
        f"#### {name}, prefill = {prefill}: {needle_scores.trials_of(hits.values())} trials a cell\n",
        *([f"Cells of fewer than {ENOUGH_TRIALS} trials are a first look: no conclusion uses them.\n"] * few),
        table(["selector", *(f"k = {k}" for k in topks)], rows),
        *_same_lines(hits),
    ]


def _same_lines(hits: Hits) -> list[str]:
    """Return which selectors are the plain mean trial by trial: nothing of theirs is in the text."""
    plain = {k: trials for (s, k), trials in hits.items() if s == "mean_pool"}
    names = [s for s in dict.fromkeys(s for s, k in hits if k) if s != "mean_pool"]
    same = [s for s in names if plain and all(hits.get((s, k)) == trials for k, trials in plain.items())]
    return [f"The same hits as `mean_pool` at every k, trial by trial: `{s}`.\n" for s in same]
