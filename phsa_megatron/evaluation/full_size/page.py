"""The files of a full-size measurement, and the Markdown page and plots that are made from them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from phsa_megatron.config.planning.compare import TOLERANCE_FRAC, compare
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.evaluation.full_size.profile_page import profile_section
from phsa_megatron.evaluation.full_size.rows import gates

ROWS_FILE = "h100_training.json"
PROFILE_FILE = "h100_training_profile.json"
EARLIER_PROFILE_FILE = "h100_training_profile_earlier.json"
CURVES_FILE = "h100_training_curves.json"
OPS_FILE = "h100_training_ops.json"
PAGE_FILE = "h100_training.md"
_COLUMNS = (
    "row", "recompute", "micro-batch", "documents", "step ms", "tokens/s", "MFU selected",
    "dense-equivalent TFLOP/s", "peak GiB", "times dense",
)  # fmt: skip
_NAMES = {"phsa": "PHSA, k = 2", "dense": "dense, cuDNN"}
EMPTY_DOCUMENTS = "6982b9e01c4671ce8b67d4b15f75d2dea437dfe0"
"""The commit whose packed dense rows gave flash the places of documents that were not there."""


def write_json(path: Path, content: Any) -> None:
    """Write a file of results in one piece."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """Return a row as a line for the terminal."""
    if "failed" in row:
        return f"{row['name']}: {row['failed'][:200]}"
    mfu = row["mfu_selected_frac"]
    return (
        f"{row['name']}: {row['step_ms']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, MFU "
        f"{'-' if mfu is None else f'{mfu:.1%}'}, {row['peak_memory_gib']:.1f} GiB, recompute "
        f"{row['recompute']}"
    )


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows that were measured so far."""
    return _read(folder / ROWS_FILE) or []


def read_curves(folder: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the loss curves that are there, by attention, and the commit of each."""
    found = _read(folder / CURVES_FILE) or {"curves": {}}
    return found["curves"], _curve_commits(found)


def _curve_commits(found: dict[str, Any]) -> dict[str, str]:
    # Before curves had commits of their own, both were of one.
    known, one = found.get("commits", {}), found.get("commit", "unknown")
    return {name: known.get(name, one) for name in found["curves"]}


def devices(folder: Path) -> set[str]:
    """Return the names of the devices that the rows and curves in a folder were measured on."""
    about = [*read_rows(folder), _read(folder / CURVES_FILE) or {}]
    return {one["device"] for one in about if "device" in one}


def write_page(folder: Path) -> Path:
    """Write the page and its plots from the files that are there; return the page."""
    rows, profiles, curves, ops = (
        _read(folder / name) for name in (ROWS_FILE, PROFILE_FILE, CURVES_FILE, OPS_FILE)
    )
    text = ["# Whole training steps of Qwen3-0.6B on one GPU", ""]
    if rows:
        text += [*_rows_section(rows), ""]
        _plot_rows(rows, folder / "h100_training.png")
        text += ["![tokens per second by sequence length](h100_training.png)", "", *_plan_section(rows), ""]
    if profiles:
        earlier = _read(folder / EARLIER_PROFILE_FILE) or []
        text += [*profile_section(profiles, earlier, PROFILE_FILE, EARLIER_PROFILE_FILE), ""]
    if ops:
        text += [*_ops_section(ops), ""]
    if curves:
        text += [*_curves_section(curves), ""]
        _plot_curves(curves["curves"], folder / "h100_training_curves.png")
        text += ["![loss by step](h100_training_curves.png)", ""]
    page = folder / PAGE_FILE
    write_atomically(page, "\n".join(text).rstrip() + "\n")
    return page


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _rows_section(rows: list[dict[str, Any]]) -> list[str]:
    about = rows[0]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    dense = {
        (r["seq_len_tokens"], r["packed"]): r for r in rows if r["attention"] == "dense" and "failed" not in r
    }
    lines = [
        f"`phsa-train measure-training --out docs/results` on one {about['device']} ({versions}), commit "
        f"{_commits(rows)}. A step is forward, backward, AdamW and everything between, on "
        "131,072 tokens of the project's own text in Qwen's tokens; medians. Texts are joined to one "
        "document a sequence, except in the packed rows, whose steps differ in their documents: the number "
        "is that of the last one. MFU counts the FLOPs that the row's attention needs, without "
        "recomputation, against 989 TFLOP/s. Each row has the best of the settings that were "
        f"tried, which [the rows]({ROWS_FILE}) list.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed'][:120]}" + " |" * (len(_COLUMNS) - 1))
            continue
        mfu = row["mfu_selected_frac"]
        base = dense.get((row["seq_len_tokens"], row["packed"]))
        ratio = "-" if base is None else f"{row['tokens_per_s'] / base['tokens_per_s']:.2f}"
        cells = (
            row["name"], row["recompute"], row["micro_batch"], row["num_documents"],
            f"{row['step_ms']:,.1f}", f"{row['tokens_per_s']:,.0f}", "-" if mfu is None else f"{mfu:.1%}",
            f"{row['dense_equiv_tflops']:.0f}", f"{row['peak_memory_gib']:.1f}", ratio,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += _packed_remark(rows)
    lines += ["", "| gate | least | goal | measured | |", "|---|---|---|---|---|"]
    for gate in gates(rows):
        value = "-" if gate.value is None else f"{gate.value:.3f}"
        lines.append(f"| {gate.name} | {gate.least} | {gate.goal} | {value} | {gate.verdict} |")
    return lines


def _commits(rows: list[dict[str, Any]]) -> str:
    """Return the commits of the rows, with the rows of each if there are several."""
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["commit"][:12], []).append(row["name"])
    if len(names) == 1:
        return f"`{next(iter(names))}`"
    return " and ".join(f"`{commit}` ({', '.join(of)})" for commit, of in names.items())


def _packed_remark(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the packed rows of dense attention are worth as a baseline."""
    packed = [r for r in rows if r["packed"] and r["attention"] == "dense" and "failed" not in r]
    if not packed:
        return []
    text = (
        "**Packed rows are no gate.** Their dense attention is torch's flash kernel for documents of many "
        "lengths, one launch for all of them; where a sequence is one document it is cuDNN's, which takes "
        "less time a pair. Transformer Engine's or flash-attn's newer kernels would serve it better still; "
        "neither could be installed on that machine."
    )
    if any(row["commit"] == EMPTY_DOCUMENTS for row in packed):
        text += (
            f" And in the code of `{EMPTY_DOCUMENTS[:12]}` the kernel was given all places that a "
            "micro-batch has for documents, one for every 16 tokens, nearly all empty: each empty one costs "
            "it workspace and thread blocks, which is taken to be why these rows take half as long again as "
            "the plan expects. Only documents with tokens are given now; that is not measured yet."
        )
    return ["", text]


def _plan_section(rows: list[dict[str, Any]]) -> list[str]:
    """Return what `phsa-train plan` predicts for the rows that were measured."""
    lines = [
        "## What the plan predicts",
        "",
        f"`phsa-train plan --compare docs/results/{ROWS_FILE}`: nothing in [the plan](../plan.md) is fitted "
        f"to these rows; the tolerance is {TOLERANCE_FRAC:.0%}. Of packed documents the plan "
        "is told the length of the one that a token is in, in the mean over tokens (`document_tokens` of the "
        "rows): dense attention's time grows with it, at flash's speed, which is assumed; PHSA's hardly "
        "depends on it. Windows of 16 + 128 tokens (4k) have no measured kernels: the plan takes those of "
        "128 + 512, an upper bound.",
        "",
        "| row | s/step | measured | off by | GiB | measured | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            continue
        lines.append(f"| {row['name']} | " + " | ".join(compare(row).cells()) + " |")
    return lines


def _ops_section(ops: dict[str, Any]) -> list[str]:
    labels = list(dict.fromkeys(label for times in ops["ops_ms"].values() for label in times))
    lines = [
        "## Norms and SwiGLU alone",
        "",
        "Milliseconds of a forward and a backward pass over 32,768 tokens, launches included.",
        "",
        "| | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    for operation, times in ops["ops_ms"].items():
        lines.append(f"| {operation} | " + " | ".join(str(times.get(label, "-")) for label in labels) + " |")
    return lines


def _curves_section(curves: dict[str, Any]) -> list[str]:
    losses_of, commit_of = curves["curves"], _curve_commits(curves)
    commits = ", ".join(f"{_NAMES[name]}: commit `{commit[:12]}`" for name, commit in commit_of.items())
    both = min(len(losses) for losses in losses_of.values())
    lines = [
        "## Loss at 4k",
        "",
        f"On one {curves['device']}, fresh weights, the same text, one seed: that both learn, not which is "
        f"better. {commits}. Means over steps that both have.",
        "",
        f"| | steps | 1 to 10 | {max(1, both - 9)} to {both} |",
        "|---|---|---|---|",
    ]
    for name, losses in losses_of.items():
        first, last = statistics.mean(losses[: min(10, both)]), statistics.mean(losses[:both][-10:])
        lines.append(f"| {_NAMES[name]} | {len(losses)} | {first:.4f} | {last:.4f} |")
    return lines


def _figure() -> Any:
    # Imported here: a machine that only measures may have no matplotlib.
    from matplotlib.figure import Figure

    return Figure(figsize=(7.2, 4.2), layout="constrained")


def _plot_rows(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.ticker import LogLocator

    figure = _figure()
    axes = figure.add_subplot()
    shown = [r for r in rows if "failed" not in r and not r["packed"]]
    for label in sorted({(r["attention"], r["topk"]) for r in shown}, key=lambda of: of[1] or 99):
        points = sorted(
            (r["seq_len_tokens"], r["tokens_per_s"]) for r in shown if (r["attention"], r["topk"]) == label
        )
        name = "dense, cuDNN" if label[0] == "dense" else f"PHSA, k = {label[1]}"
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    lengths = sorted({r["seq_len_tokens"] for r in shown})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks([], minor=True)
    axes.set(
        title="Qwen3-0.6B, whole training step, one GPU", xlabel="tokens of a sequence", ylabel="tokens/s"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    _save(figure, path)


def _plot_curves(curves: dict[str, list[float]], path: Path) -> None:
    figure = _figure()
    axes = figure.add_subplot()
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, label=_NAMES[name], linewidth=1)
    axes.set(title="Qwen3-0.6B at 4k from fresh weights", xlabel="step", ylabel="nats a token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120, metadata={"Software": ""})
