"""What another device or dtype changes in the needle study: two folders of cells, trial by trial."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError
from phsa_megatron.evaluation.needle_scores import digits_of
from phsa_megatron.evaluation.needles import NUM_DIGITS
from phsa_megatron.evaluation.study_setup import read_cells


def compare(these: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return how many hits differ, by text, length, prefill, selector and k, in the trials that both have.

    Raises:
        DataError: they have no trial in common, or not the same texts.
    """
    sha256 = {cell["text"]: cell["text_sha256"] for cell in others}
    for cell in these:
        if sha256.get(cell["text"], cell["text_sha256"]) != cell["text_sha256"]:
            raise DataError(
                f"the text {cell['text']} has SHA-256 {cell['text_sha256']} in one folder and "
                f"{sha256[cell['text']]} in the other: their trials are not the same; measure one again"
            )
    names = [", ".join(sorted({f"{c['device']} {c['dtype']}" for c in cells})) for cells in (these, others)]
    records, found = [], digits_of(others)
    for (prefill, text, tokens), digits in digits_of(these).items():
        for (selector, topk), own in digits.items():
            other = found.get((prefill, text, tokens), {}).get((selector, topk), {})
            common = own.keys() & other.keys()
            if common:
                where = {"prefill": prefill, "text": text, "num_tokens": tokens}
                hits, expected = ([x[n] == NUM_DIGITS for n in sorted(common)] for x in (own, other))
                counts = {
                    "trials": len(common),
                    "hits": sum(hits),
                    "hits_of_other": sum(expected),
                    "hits_that_differ": sum(a != b for a, b in zip(hits, expected, strict=True)),
                    "num_digits_that_differ": sum(own[n] != other[n] for n in common),
                }
                records.append(
                    where | {"selector": selector, "topk": topk, "this": names[0], "other": names[1]} | counts
                )
    if not records:
        raise DataError(
            "the two folders have no trial of one text, length, prefill, selector and k in common"
        )
    return records


def run_check(arguments: argparse.Namespace) -> None:
    """Write OUT/check.json from OUT/needles.jsonl and AGAINST/needles.jsonl."""
    folders: list[Path] = [arguments.out, arguments.against]
    records = compare(*(read_cells(folder / "needles.jsonl") for folder in folders))
    path = arguments.out / "check.json"
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    trials, differ = (sum(r[key] for r in records) for key in ("trials", "hits_that_differ"))
    print(f"{records[0]['this']} against {records[0]['other']}: {differ} of {trials} hits differ")
