"""Sentences and tables on whether punctuation finds more needles than what stands in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phsa_megatron.evaluation import needle_scores
from phsa_megatron.evaluation.needle_scores import CONTROLS, Difference, Hits
from phsa_megatron.evaluation.page_parts import table
from phsa_megatron.evaluation.study_texts import TEXTS

PAIRS = (
    *(("phsa", other) for other in (*CONTROLS, "infllm_v2", "moba", "halves", "cumulant", "minmax")),
    *((f"{pool}_phsa", pool) for pool in ("halves", "cumulant", "minmax")),
)
"""Punctuation and what it is held to: its controls, other selectors, and other pools without it."""
_SAYS = {
    "finds more": "finds more than",
    "finds fewer": "finds fewer than",
    "no difference is shown": "is not shown to differ from",
}
_GROUPS = {"English punctuation": "en", "English and Chinese punctuation": "en_zh"}
Places = Mapping[str, Hits]
"""Hits by text, or by text and length."""


def groups_of(places: Places) -> dict[str, dict[str, Hits]]:
    """Return the texts by their punctuation set: that of Chinese is another."""
    groups = {
        about: {name: hits for name, hits in places.items() if TEXTS[name.split(",")[0]][0] == language}
        for about, language in _GROUPS.items()
    }
    return {about: texts for about, texts in groups.items() if texts}


def needle_verdicts(prefill: str, places: Places, topks: Sequence[int]) -> list[str]:
    """Return, by punctuation set, who finds more over all k, and at which text and k an interval says so."""
    lines = []
    for about, texts in groups_of(places).items():
        by_one: dict[str, dict[str, list[str]]] = {}
        says = []
        for one, other in PAIRS:
            total = needle_scores.difference(list(texts.values()), one, other, topks)
            if total is None:
                continue
            by_one.setdefault(one, {}).setdefault(_SAYS[total.verdict], []).append(f"`{other}`")
            says.append(
                f"- `{one}` against `{other}`: {total.verdict}, {total}, {total.num_trials} trials; "
                f"{_where(texts, one, other, topks)}"
            )
        if says:
            lines += [
                f"**Needles, prefill = {prefill}, {about} ({', '.join(texts)})**: {_summary(by_one)}\n",
                *says,
                "",
            ]
    return lines


def _summary(by_one: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Return a sentence for each selector with punctuation."""
    return " ".join(
        f"`{one}` " + "; ".join(f"{says} {', '.join(others)}" for says, others in by_verdict.items()) + "."
        for one, by_verdict in by_one.items()
    )


def _where(texts: Places, one: str, other: str, topks: Sequence[int]) -> str:
    """Return at which k of which texts an interval excludes zero."""
    found: dict[str, list[str]] = {"finds more": [], "finds fewer": []}
    for name, hits in texts.items():
        at: dict[str, list[int]] = {}
        for k in topks:
            at_k = needle_scores.difference([hits], one, other, [k])
            if at_k:
                at.setdefault(at_k.verdict, []).append(k)
        for verdict, where in found.items():
            if at.get(verdict):
                where.append(f"{name} (k = {', '.join(map(str, at[verdict]))})")
    parts = [f"{verdict} in {', '.join(where)}" for verdict, where in found.items() if where]
    return "by text and k: " + ("; ".join(parts) if parts else "no interval excludes zero")


def pair_tables(places: Places, topks: Sequence[int]) -> list[str]:
    """Return the differences by k: all pairs by punctuation set, and the first two by text."""

    def row(head: Sequence[str], texts: Places, one: str, other: str) -> list[list[str]]:
        def at(ks: Sequence[int]) -> Difference | None:
            return needle_scores.difference(list(texts.values()), one, other, ks)

        total = at(topks)
        cells = [at([k]) for k in topks]
        return [[*head, *("-" if d is None else str(d) for d in cells), f"{total}"]] if total else []

    groups = groups_of(places)
    columns = [*(f"k = {k}" for k in topks), "mean over k"]
    by_group = [
        line
        for one, other in PAIRS
        for texts in groups.values()
        for line in row([f"{one} - {other}", ", ".join(texts)], texts, one, other)
    ]
    by_text = [
        line
        for one, other in PAIRS[:2]
        for name, hits in places.items()
        for line in row([f"{one} - {other}", name], {name: hits}, one, other)
    ]
    if not by_group:
        return []
    return [
        "Differences of the share found, with a 95% interval over trials:\n",
        table(["", "texts", *columns], by_group),
        table(["", "text", *columns], by_text),
    ]
