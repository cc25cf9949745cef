"""What the study shows about why punctuation finds more or fewer needles than the plain mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from phsa_megatron.evaluation import needle_scores
from phsa_megatron.evaluation.needle_scores import Hits, Where
from phsa_megatron.evaluation.page_parts import origin, table

_RECIPE_LAMBDA = 0.5
_BRANCHES = ("phsa", "random_tokens")
_COLUMNS = [(selector, k) for selector in (*_BRANCHES, "mean_pool") for k in (2, 8)]


def lambda_part(cells: list[dict[str, Any]]) -> list[str]:
    """Return the section on the weight of the second branch: lambda 1 is the plain mean of a block."""
    parts = [
        "## The weight of the branch\n",
        "A pooled key is lambda times the mean of its block and 1 - lambda times the mean of its "
        "punctuation (`phsa`) or of as many random tokens (`random_tokens`). Hits by lambda, and the "
        "difference from the plain mean (lambda 1) in the share found, trial by trial:\n",
        origin(cells),
    ]
    for (prefill, text, tokens), hits in needle_scores.hits_of(cells).items():
        for k in sorted({k for _, k in hits if k}):
            rows, below = _rows(hits, k)
            parts += [
                f"{text}, {tokens:,} tokens, prefill = {prefill}, k = {k}:\n",
                table(["branch", "lambda", "hits", "minus lambda 1"], rows),
                *below,
            ]
    return parts


def _rows(hits: Hits, topk: int) -> tuple[list[list[str]], list[str]]:
    rows, fewer, more, rising = [], [], [], []
    for branch in _BRANCHES:
        counts: list[int] = []
        names = {_lambda_of(s): s for s, k in hits if k == topk and s.partition("@")[0] == branch}
        for lam, name in sorted(names.items()):
            difference = needle_scores.difference([hits], name, "mean_pool", [topk])
            counts.append(sum(hits[name, topk].values()))
            rows.append(
                [branch, f"{lam:g}", needle_scores.with_interval(hits[name, topk]), f"{difference or '-'}"]
            )
            if difference and difference.high < 0:
                fewer.append(f"`{branch}` {lam:g}")
            if difference and difference.low > 0:
                more.append(f"`{branch}` {lam:g}")
        counts.append(sum(hits.get(("mean_pool", topk), {}).values()))
        if len(counts) > 2 and all(a < b for a, b in pairwise(counts)):
            rising.append(f"`{branch}`")
    rows.append(["-", "1", needle_scores.with_interval(hits.get(("mean_pool", topk))), ""])
    says = f"Fewer than the plain mean: {', '.join(fewer) or 'none'}; more: {', '.join(more) or 'none'}."
    if rising:
        says += f" The more weight the plain mean has, the more is found, at every step: {', '.join(rising)}."
    return rows, [says + "\n"]


def _lambda_of(name: str) -> float:
    return float(name.partition("@")[2] or _RECIPE_LAMBDA)


def blocks_part(path: Path, cells: list[dict[str, Any]]) -> list[str]:
    """Return the section on punctuation in the needles' own blocks, or nothing without its file.

    Args:
        path: what `selector-study blocks` has written.
        cells: of needles; those of another version of a text are not counted.
    """
    if not path.is_file():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))
    found = needle_scores.hits_of(cells)
    versions = {(c["text"], c["text_sha256"]) for c in cells}
    same = [r for r in records if (r["text"], r["text_sha256"]) in versions]
    others = [r["text"] for r in records if r not in same]
    about = [
        [r["text"], f"{r['blocks_with_punctuation_frac']:.1%}", f"{r['punctuation_per_block']:.2f}"]
        for r in records
    ]
    rows = []
    for prefill in dict.fromkeys(prefill for prefill, _, _ in found):
        for says in ("all", "some", "none"):
            counts = [_counts(same, found, prefill, says, selector, k) for selector, k in _COLUMNS]
            rows.append([prefill, says, *counts])
    return [
        "## Punctuation in the blocks\n",
        "Blocks of 16 tokens with punctuation in each text, and hits by whether the blocks of the needle's "
        "digits, one or two, have any. If blocks without punctuation were what `phsa` loses by, it would be "
        "near `mean_pool` where all of the digits' blocks have some.\n",
        f"Hits are sums over {', '.join(r['text'] for r in same) or 'no text'}, as far as measured. Not "
        f"counted, as the cells are of another version of the text: {', '.join(others) or 'none'}.\n",
        table(["text", "blocks with punctuation", "punctuation tokens a block"], about),
        table(["prefill", "digits' blocks with punctuation", *(f"{s}, k = {k}" for s, k in _COLUMNS)], rows),
    ]


def _counts(
    records: list[dict[str, Any]],
    found: Mapping[Where, Hits],
    prefill: str,
    says: str,
    selector: str,
    topk: int,
) -> str:
    """Return `hits/trials` of those trials of whose digits' blocks all, some or none have punctuation."""
    own = []
    for record in records:
        hits = found.get((prefill, record["text"], record["num_tokens"]), {}).get((selector, topk), {})
        shares = record["digit_blocks_with_punctuation_frac"]
        kinds = ["all" if x == 1 else "some" if x else "none" for x in shares]
        own += [hit for n, hit in hits.items() if n < len(kinds) and kinds[n] == says]
    return f"{sum(own)}/{len(own)}" if own else "-"
