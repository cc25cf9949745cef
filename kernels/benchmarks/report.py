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


def table(rows):
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(row[column]) for column in COLUMNS) + " |" for row in rows]
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


def write_report(rows, folder):
    first = rows[0]
    head = (
        f"{first['device']}, torch {first['torch']}, triton {first['triton']}, commit {first['commit']}\n\n"
    )
    (folder / "h100.md").write_text(head + table(rows))
    plot(rows, folder / "h100.png")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text()), source.parent)
