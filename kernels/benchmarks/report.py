"""The benchmark's rows as a Markdown table and a plot of speed-up against length."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLUMNS = (
    "heads_q", "heads_kv", "block", "group_score", "seq_len_tokens", "topk", "overlap", "share_t32", "stage",
    "pass", "ours_ms", "ours_eager_ms", "roofline_ms", "cudnn_ms", "ratio", "peak_extra_mib",
    "beyond_results_mib", "limit_mib", "cudnn_peak_extra_mib",
)  # fmt: skip


DECODE_COLUMNS = (
    "heads_q", "heads_kv", "seq_len_tokens", "batch", "topk", "stage", "ours_ms", "roofline_ms", "dense_ms",
    "dense", "ratio",
)  # fmt: skip


def table(rows, columns=COLUMNS):
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def break_even(points):
    """Length at which the ratio passes 1, by lines between the measured lengths; None if it does not."""
    for (n0, r0), (n1, r1) in zip(points, points[1:], strict=False):
        if r0 < 1 <= r1:
            return n0 + (n1 - n0) * (1 - r0) / (r1 - r0)
    return None


def plot(rows, path):
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, kind in zip(axes, ("fwd", "fwd_bwd"), strict=True):
        for heads in sorted({row["heads_q"] for row in rows if row["heads_kv"] == 8}):
            for topk in (2, 16):
                wanted = {
                    "stage": "module",
                    "pass": kind,
                    "heads_q": heads,
                    "topk": topk,
                    "overlap": "measured",
                    "block": 16,
                    "group_score": "softmax_sum",
                }
                mine = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
                points = sorted((row["seq_len_tokens"], row["ratio"]) for row in mine)
                if not points:
                    continue
                at = break_even(points)
                name = f"{heads}/8 heads, k = {topk}" + (f", even at {at / 1024:.1f}k" if at else "")
                (line,) = axis.plot(*zip(*points, strict=True), marker="o", label=name)
                if at:
                    axis.plot([at], [1], marker="x", markersize=10, color=line.get_color())
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="tokens",
            title={"fwd": "forward"}.get(kind, "forward + backward"),
        )
        axis.legend(fontsize=8)
    axes[0].set_ylabel("times as fast as cuDNN (whole module)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot_decode(rows, path):
    figure, axis = pyplot.subplots(figsize=(6, 4.2))
    for batch in sorted({row["batch"] for row in rows}):
        for topk in (2, 16):
            wanted = {"stage": "attention", "heads_q": 16, "topk": topk, "batch": batch}
            mine = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
            points = sorted((row["seq_len_tokens"], row["ratio"]) for row in mine)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=f"batch {batch}, k = {topk}")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", title="one token, 16/8 heads")
    axis.set_ylabel("times as fast as dense decoding")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def headline(rows):
    first = rows[0]
    return (
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}\n\n"
    )


def write_report(rows, folder):
    """Write the table of all rows, and plots of those of whole sequences and of one token a sequence."""
    whole = [row for row in rows if row["pass"] != "decode"]
    decode = [row for row in rows if row["pass"] == "decode"]
    text = ""
    if whole:
        text += headline(whole) + table(whole)
        plot(whole, folder / "h100.png")
    if decode:
        text += f"\n## One token a sequence\n{headline(decode)}" + table(decode, DECODE_COLUMNS)
        plot_decode(decode, folder / "h100_decode.png")
    (folder / "h100.md").write_text(text)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text()), source.parent)
