"""Writes the measured kernel rows that `phsa-train plan` reads, from the benchmark's results.

    python kernels/benchmarks/plan_table.py

A test holds the written table to the results: run this again after a benchmark.
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "h100.json"
TABLE = Path(__file__).parents[2] / "phsa_megatron" / "config" / "planning" / "h100_attention.json"


def is_planned(row):
    """Rows with a trained model's overlap of neighbours, of the two head shapes at block 16."""
    plain = row["block"] == 16 and row["group_score"] == "softmax_sum"
    return plain and row["overlap"] == "measured"


def plan_table(rows):
    """Return the rows that the plan reads, and each dense row once."""
    rows = [row for row in rows if is_planned(row)]
    shared = ("head_dim", "block", "init_tokens", "local_tokens", "group_score", "device", "torch", "triton")
    for key in (*shared, "commit"):
        assert len({row[key] for row in rows}) == 1, f"rows differ in {key}: the table has one value"
    sparse = [
        [row[key] for key in ("heads_q", "heads_kv", "seq_len_tokens", "topk", "stage", "pass", "ours_ms")]
        for row in rows
    ]
    eager = [
        [row[key] for key in ("heads_q", "seq_len_tokens", "topk", "pass", "ours_eager_ms")]
        for row in rows
        if row["stage"] == "module" and row["seq_len_tokens"] == min(r["seq_len_tokens"] for r in rows)
    ]
    dense = {
        (row["heads_q"], row["heads_kv"], row["seq_len_tokens"], row["pass"]): row["cudnn_ms"] for row in rows
    }
    return {key: rows[0][key] for key in (*shared, "commit")} | {
        "source": "kernels/benchmarks/results/h100.json",
        "phsa_columns": ["heads_q", "heads_kv", "seq_len_tokens", "topk", "stage", "pass", "ms"],
        "phsa": sorted(sparse),
        "eager_columns": ["heads_q", "seq_len_tokens", "topk", "pass", "ms"],
        "eager": sorted(eager),
        "dense_columns": ["heads_q", "heads_kv", "seq_len_tokens", "pass", "ms"],
        "dense": sorted([*key, ms] for key, ms in dense.items()),
    }


def text(table):
    """Return the table as JSON, one row a line."""
    lines = []
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f' "{key}": [\n  {rows}\n ]')
        else:
            lines.append(f' "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(text(plan_table(json.loads(RESULTS.read_text()))))
    print(f"wrote {TABLE}")
