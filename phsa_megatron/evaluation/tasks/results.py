"""results.json, results.md and plots of one evaluation, from its records alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phsa_megatron.evaluation import plots
from phsa_megatron.evaluation.tasks.figures import heat_map
from phsa_megatron.evaluation.tasks.long_context import HAS_DEPTH, LONG_TASKS
from phsa_megatron.evaluation.tasks.settings import PERPLEXITY

Record = dict[str, Any]
_ABOUT = (
    "A cell is the mean with its 95% interval in brackets: Wilson's for hits and misses, the bootstrap over "
    "samples or documents elsewhere, lm-eval's standard error for its tasks."
)


def write(out: Path, content: dict[str, Any]) -> str:
    """Write results.json, results.md and the plots; return the page.

    Args:
        out: the folder, made if it is not there.
        content: `command`, `settings`, `environment`, `records`, `sparsity`.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(content), indent=1, ensure_ascii=False)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    records: list[Record] = content["records"]
    sections = [
        ("Long-context tasks: recall by length", _long(out, records)),
        ("Training k and inference k: recall over all lengths", _matrices(out, records)),
        ("LongBench", _by_task(records, "longbench", average=True)),
        ("Loss by position, nats per token", _perplexity(out, records)),
        ("General tasks", _by_task(records, "general", average=False)),
        ("Sparsity", _sparsity(content["sparsity"])),
        ("Generation", _without_cache(records)),
    ]
    body = "\n".join(f"## {title}\n\n{part}" for title, part in sections if part)
    page = f"# Evaluation\n\n`{content['command']}`\n\n{_ABOUT}\n\n{body}"
    (out / "results.md").write_text(page, encoding="utf-8")
    return page


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(record: Record | None, digits: int = 2) -> str:
    """Return a mean with its interval."""
    if record is None:
        return "-"
    text = f"{record['mean']:.{digits}f}"
    if math.isnan(record["low"]):
        return text
    return f"{text} [{record['low']:.{digits}f}, {record['high']:.{digits}f}]"


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_name(record) for record in records))


def _name(record: Record) -> str:
    name: str = record["name"]
    return name if record["step"] is None else f"{name}, step {record['step']}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _long(out: Path, records: list[Record]) -> str:
    text = ""
    for task in LONG_TASKS:
        own = [r for r in records if r["task"] == task and r["depth"] is None]
        if not own:
            continue
        lengths = sorted({r["length"] for r in own})
        found = {(_name(r), r["length"]): r for r in own}
        samples = sorted({r["num_samples"] for r in own})
        rows = [[name, *(cell(found.get((name, length))) for length in lengths)] for name in _names(own)]
        text += f"**{task}**, {' or '.join(map(str, samples))} samples a cell\n\n"
        text += table(["model", *(f"{length:,}" for length in lengths)], rows) + "\n"
        series = {name: {r["length"]: r["mean"] for r in own if _name(r) == name} for name in _names(own)}
        plots.curves(out / f"{task}.png", series, title=f"{task}: recall", x_label="tokens", y_label="recall")
        text += f"![{task} by length]({task}.png)\n\n"
        if task in HAS_DEPTH:
            text += _depths(out, task, [r for r in records if r["task"] == task and r["depth"] is not None])
    return text


def _depths(out: Path, task: str, records: list[Record]) -> str:
    text = ""
    lengths, depths = sorted({r["length"] for r in records}), sorted({r["depth"] for r in records})
    for name in _names(records):
        own = {(r["depth"], r["length"]): r["mean"] for r in records if _name(r) == name}
        file = f"{task}_{_slug(name)}.png"
        heat_map(
            out / file,
            [[own.get((depth, length), math.nan) for length in lengths] for depth in depths],
            rows=[f"{depth:.0%}" for depth in depths],
            columns=[f"{length:,}" for length in lengths],
            title=f"{task}: {name}",
            y_label="depth",
            x_label="tokens",
        )
        text += f"![{task} by depth and length, {name}]({file})\n"
    return text + "\n"


def _matrices(out: Path, records: list[Record]) -> str:
    """Return, by selector and task, recall with the training k in rows and the inference k in columns."""
    text = ""
    chosen = [
        r for r in records if r["task"] in LONG_TASKS and r["depth"] is None and r["infer_topk"] is not None
    ]
    for selector in dict.fromkeys(r["selector"] for r in chosen):
        for task in LONG_TASKS:
            own = [r for r in chosen if r["task"] == task and r["selector"] == selector]
            trained = sorted({r["train_topk"] or 0 for r in own})
            inferred = sorted({r["infer_topk"] for r in own})
            if len(trained) < 2 and len(inferred) < 2:
                continue
            means = {}
            for k, at in ((k, at) for k in trained for at in inferred):
                these = [r for r in own if (r["train_topk"] or 0) == k and r["infer_topk"] == at]
                samples = sum(r["num_samples"] for r in these)
                if samples:
                    means[k, at] = sum(r["mean"] * r["num_samples"] for r in these) / samples
            rows = [
                [_trained(k), *(f"{means[k, at]:.2f}" if (k, at) in means else "-" for at in inferred)]
                for k in trained
            ]
            text += f"**{task}**, {selector}\n\n"
            text += table(["trained with", *(f"k = {at}" for at in inferred)], rows) + "\n"
            file = f"matrix_{task}_{_slug(selector)}.png"
            heat_map(
                out / file,
                [[means.get((k, at), math.nan) for at in inferred] for k in trained],
                rows=[_trained(k) for k in trained],
                columns=[str(at) for at in inferred],
                title=f"{task}: {selector}",
                y_label="trained with",
                x_label="k in inference",
            )
            text += f"![{task}, training k by inference k]({file})\n\n"
    return text


def _trained(topk: int) -> str:
    return f"k = {topk}" if topk else "no selection"


def _by_task(records: list[Record], group: str, *, average: bool) -> str:
    own = [r for r in records if r.get("group") == group]
    if not own:
        return ""
    names = _names(own)
    keys = list(dict.fromkeys((r["task"], r["metric"], r.get("seed")) for r in own))
    found = {(_name(r), r["task"], r["metric"], r.get("seed")): r for r in own}
    rows = []
    for task, metric, seed in keys:
        label = metric if seed is None else f"{metric}, seed {seed}"
        rows.append([task, label, *(cell(found.get((name, task, metric, seed)), 4) for name in names)])
    if average:
        means = [[r["mean"] for r in own if _name(r) == name] for name in names]
        rows.append(["average", f"of {len(keys)}", *(f"{sum(m) / len(m):.4f}" for m in means)])
    return table(["task", "metric", *names], rows)


def _perplexity(out: Path, records: list[Record]) -> str:
    own = [r for r in records if r["task"] == PERPLEXITY]
    if not own:
        return ""
    names = _names(own)
    found = {(_name(r), r["first"]): r for r in own}
    parts = sorted({(r["first"], r["end"]) for r in own})
    rows = []
    for first, end in parts:
        documents = max(r["num_samples"] for r in own if r["first"] == first)
        rows.append(
            [f"{first:,} to {end:,}", str(documents), *(cell(found.get((n, first)), 4) for n in names)]
        )
    series = {name: {r["end"]: r["mean"] for r in own if _name(r) == name} for name in names}
    plots.curves(
        out / "perplexity.png",
        series,
        title="loss by position in the document",
        x_label="position, end of the part",
        y_label="nats/token",
    )
    page = table(["position, tokens", "documents", *names], rows)
    return page + "\nPerplexity is the exponential of it.\n\n![loss by position](perplexity.png)\n"


def _sparsity(records: list[Record]) -> str:
    names, lengths = _names(records), sorted({r["length"] for r in records})
    found = {(_name(r), r["length"]): r for r in records}
    rows = []
    for name in names:
        cells = [found[name, length] for length in lengths]
        rows.append([name, *(f"{r['last_token_frac']:.2%} / {r['mean_frac']:.2%}" for r in cells)])
    head = (
        "Share of what dense attention reads that is left out, in layers that select: by the last token of a "
        "text of this length / by all causal (query, key) pairs.\n\n"
    )
    return head + table(["model", *(f"{length:,}" for length in lengths)], rows)


def _without_cache(records: list[Record]) -> str:
    asked = [r for r in records if r["task"] != PERPLEXITY and r["without_cache"] is not None]
    reasons = {_name(r): r["without_cache"] for r in asked}
    return "".join(f"- {name}: generated without a cache: {reason}\n" for name, reason in reasons.items())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
