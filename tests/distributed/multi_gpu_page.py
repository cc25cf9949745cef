"""The results of `multi_gpu.py` as a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LAYERS_OF_8B = 36


def page(report: dict[str, Any]) -> str:
    """Return the page of a report; what is missing is named."""
    cases = _named(report)
    kinds = {kind: [c for c in cases if c["kind"] == kind] for kind in ("layout", "timing", "resume")}
    commits = sorted({case["commit"] for case in cases})
    lines = [
        f"# {report['processes']} processes: {report['device']}",
        "",
        f"`tests/distributed/multi_gpu.py --processes {report['processes']} --size {report['size']}`, torch "
        f"{report['torch']}, megatron-core {report['megatron_core']}, NCCL {report.get('nccl', '-')}, "
        + (f"commit {commits[0]}." if len(commits) == 1 else f"commits {', '.join(commits)}, named by case."),
    ]
    if kinds["layout"]:
        lines += ["", "## Layouts against one process", "", *_layouts(kinds["layout"])]
    if kinds["timing"]:
        lines += ["", "## Times", "", *_times(kinds["timing"])]
        lines += _by_layer(kinds["timing"])
    for case in kinds["resume"]:
        lines += ["", f"## {case['shown']}: from N processes to N / 2 and back", "", *_resume(case)]
    notes = [f"- {case['shown']}: {case['note']}" for case in cases if "note" in case]
    lines += ["", "## Notes", "", *notes] if notes else []
    failed = [case["shown"] for case in cases if "error" in case or case.get("passed") is False]
    lines += [
        "",
        f"Failed: {', '.join(failed) or 'none'}. Not run: {', '.join(report['not_run']) or 'none'}.",
    ]
    again = [case["shown"] for case in cases if case.get("again")]
    lines[-1] += f" To be run again: {', '.join(again)}." if again else ""
    return "\n".join(lines) + "\n"


def _named(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all cases with `shown`: the name, and the commit where not all are of one."""
    cases = [{"commit": report["commit"]} | case for case in report["cases"]]
    several = len({case["commit"] for case in cases}) > 1
    return [case | {"shown": case["name"] + f" @ {case['commit'][:7]}" * several} for case in cases]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(columns)
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _layouts(cases: list[dict[str, Any]]) -> list[str]:
    rows = []
    for case in cases:
        if "worst_distance" not in case:
            rows.append([case["shown"], "failed", "", "", "", "no"])
            continue
        rows.append([
            case["shown"], f"{case['worst_distance']:.2e} / {case['worst_bound']:.2e}",
            f"{case['mean_distance']:.2e} / {case['mean_of_one']:.2e}", f"{case['loss_frac']:.1e}",
            f"{case['other_blocks_frac']:.2%} / {case['other_blocks_of_one_frac']:.2%}",
            "yes" if case["passed"] else "no",
        ])  # fmt: skip
    columns = ["layout", "worst gradient: distance / bound", "mean distance: layout / one process", "loss"]
    columns += ["other blocks: layout / one process", "passed"]
    note = (
        "Distances are relative L2 distances of gradients from one process in fp32 with the reference ops; "
        "the bound is twice that of one process in the run's dtype. Names with a dash are controls: they "
        "pass if they are out of bounds."
    )
    return [*_table(columns, rows), "", note]


def _times(cases: list[dict[str, Any]]) -> list[str]:
    alone = {_shape(case): case for case in cases if case.get("context") == 1 and "step_s" in case}
    rows = []
    for case in cases:
        if "step_s" not in case:
            rows.append([case["shown"], *[""] * 8, "failed"])
            continue
        one, gpus = alone.get(_shape(case)), case["gpus"]
        efficiency = case["tokens_per_s"] / gpus / one["tokens_per_s"] if one else None
        plan = case.get("plan_step_s")
        rows.append([
            case["shown"], str(case["layers"]), f"{case['step_s']:.3f}", f"{case['tokens_per_s']:,.0f}",
            "" if efficiency is None else f"{efficiency:.2f}", f"{case.get('computing_s', 0):.3f}",
            f"{case.get('nccl_exposed_s', 0):.3f}", f"{case['sent_mib']:,.0f}",
            f"{case['peak_gib']:.1f}" if "peak_gib" in case else "",
            "" if plan is None else f"{plan:.3f} ({plan / case['step_s'] - 1:+.0%}), {case['plan_gib']:.1f}",
        ])  # fmt: skip
    columns = [
        "case",
        "layers",
        "s/step",
        "tokens/s",
        "efficiency",
        "computing, s",
        "exposed communication, s",
        "MiB sent for keys",
    ]
    columns += ["peak GiB", "plan: s/step, GiB"]
    note = (
        "Efficiency: tokens/s of a GPU over those of one GPU alone. Computing: while a kernel runs that is "
        "not NCCL's; exposed communication, waiting for other processes included: while only NCCL's do. In "
        "the rest of a step the GPU waits for the host. Random tokens and fresh weights: neighbours share "
        "hardly any block. Dense attention is torch's scaled_dot_product_attention over all "
        "keys, gathered (no Transformer Engine, no ring). Recomputation is full; vocabularies of 8,192 leave "
        "most of the output layer's time out."
    )
    launches = sorted(case["launch_us"] for case in cases if "launch_us" in case)
    if launches:
        note += f" A launch took the host {launches[0]:.1f} to {launches[-1]:.1f} us."
    return [*_table(columns, rows), "", note]


def _shape(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case.get(key) for key in ("model", "seq_len", "attention", "layers", "vocab", "documents"))


def _by_layer(cases: list[dict[str, Any]]) -> list[str]:
    """Return what the difference of 3 layers and 1 says of a layer, and of all layers of the model."""
    rows = []
    keys = ("model", "seq_len", "attention", "context", "exchange")
    timed = {(*(case[key] for key in keys), case["layers"]): case for case in cases if "step_s" in case}
    for (*key, layers), case in timed.items():
        one = timed.get((*key, 1))
        if layers != 3 or one is None:
            continue
        layer_s = (case["step_s"] - one["step_s"]) / 2
        total = LAYERS_OF_8B if case["model"] == "8b" else 28
        step_s = one["step_s"] + (total - 1) * layer_s
        tokens = case["tokens_per_s"] * case["step_s"]
        name = "_".join(str(part) for part in key)
        rows.append([name, f"{layer_s * 1e3:.1f}", f"{total}", f"{step_s:.2f}", f"{tokens / step_s:,.0f}"])
    if not rows:
        return []
    columns = ["case", "ms/layer", "layers", "s/step, scaled", "tokens/s, scaled"]
    note = "Scaled from steps of 1 and of 3 layers; no such model was run."
    return ["", *_table(columns, rows), "", note]


def _resume(case: dict[str, Any]) -> list[str]:
    if "first_steps" not in case:
        return [f"Failed: {(case.get('error') or case.get('reason', ''))[:300]}"]
    counts = " -> ".join(map(str, case["processes"]))
    rows = []
    for one in case["first_steps"]:
        numbers = [f"{one['loss']:.5f}", f"{one['loss_of_the_other']:.5f}", f"{one['distance_frac']:.1e}"]
        numbers += [f"{one['bound_frac']:.1e}", f"{one['steps_that_fit_frac']:.0%}"]
        rows.append([str(one["step"]), *numbers])
    columns = ["first step", "loss", "of the run that stays", "distance", "bound", "steps whose loss fits"]
    same = "the same" if case["same_data"] else "NOT the same"
    text = f"{counts} processes, checkpoints at steps {case['stops'][:-1]}. At every step tokens with a loss "
    text += f"are {same}."
    return [text, "", *_table(columns, rows)]
