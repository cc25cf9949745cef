"""Prints a plan as tables, and writes it as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phsa_megatron.config.derive import world_size
from phsa_megatron.config.planning.attention_time import attention_time
from phsa_megatron.config.planning.reasons import layout_text, reasons, what_takes_the_step
from phsa_megatron.config.planning.search import MOST_TOKENS, Estimate, Plan
from phsa_megatron.config.planning.sweep import Point

ASSUMPTIONS = (
    "every sequence is one document, which is the most work for attention",
    "ranks are laid out tensor, context, data, pipeline; a group over several hosts uses all its adapters",
    "context-parallel processes have equal work, 1/CP of a sequence's at measured speed; of heads, 1/TP",
    "they move keys of others and their gradients at the speed of a copy, and choose every block if they "
    "choose as many times",
    "tensor-parallel communication is exposed; keys and values arrive while the selection computes",
    "with overlap, gradients leave during the last backward pass and weights arrive during the first "
    "forward pass, but for one layer's; what is sent between stages is hidden with virtual stages only, the "
    "start of a send never",
    "all stages are as slow as the last, and the bubble is (PP - 1) / VPP micro-batches",
    "dense attention runs at cuDNN's speed, which torch may not choose, and on whole documents",
    "evaluation, saving, data and stragglers take no time",
)
"""What the model of a step leaves out or takes for granted, for the report and docs/plan.md."""


def print_plan(plan: Plan, console: Console, top: int, gpu_hour_usd: float | None) -> None:
    """Print the best layouts, why they are the best, what was left out, and what it all rests on."""
    best = plan.best(top)
    console.print(_layouts(plan, best, top, gpu_hour_usd))
    if plan.as_written is None:
        console.print(Text(f"The run as written breaks a rule: {plan.broken_rules}"))
    elif not plan.as_written.fits:
        console.print(
            Text(f"The run as written needs {plan.as_written.over_gib:.1f} GiB more than there is.")
        )
    for number, estimate in enumerate(best, 1):
        console.print(Text(f"\n{number}. {layout_text(estimate)}", style="bold"))
        for reason in reasons(estimate, plan):
            console.print(Text(f"   {reason}"))
    if best:
        console.print(Text(f"\nThe first as settings: {' '.join(best[0].layout.settings())}\n"))
        for table in (_memory(best[0], plan), _sent(best[0], plan), _step(best[0])):
            console.print(table)
    else:
        least = min(plan.too_big, key=lambda estimate: estimate.over_gib)
        console.print(
            Text(
                f"No layout fits. The smallest, {layout_text(least)}, needs {least.over_gib:.1f} GiB more "
                "than there is: use more GPUs, shorter sequences or a smaller model."
            )
        )
    if plan.refused:
        console.print(_refused(plan))
    console.print(_inputs(plan))
    console.print(Text("Taken for granted:"))
    for line in (*ASSUMPTIONS, *notes(plan)):
        console.print(Text(f"  - {line}"))


def notes(plan: Plan) -> list[str]:
    """Return where measured rows do not cover this run, and the bounds of the search."""
    bounds = (
        f"tried: tensor-parallel groups inside a host, and micro-batches of several sequences up to "
        f"{MOST_TOKENS:,} tokens a process"
    )
    return [*attention_time(plan.config).notes, bounds]


def as_json(plan: Plan, top: int, gpu_hour_usd: float | None, points: list[Point]) -> dict[str, Any]:
    """Return the plan for programs: every number that is printed, and the points of the plot."""

    def one(estimate: Estimate) -> dict[str, Any]:
        price = None if gpu_hour_usd is None else estimate.usd_per_million_tokens(plan.config, gpu_hour_usd)
        return asdict(estimate) | {
            "fits": estimate.fits,
            "settings": estimate.layout.settings(),
            "reasons": reasons(estimate, plan),
            "usd_per_million_tokens": price,
        }

    return {
        "run": plan.config.run.name,
        "gpus": world_size(plan.config),
        "seq_len_tokens": plan.config.data.seq_len_tokens,
        "global_batch_sequences": plan.config.optim.global_batch_sequences,
        "usable_gib": plan.machine.usable_gib,
        "broken_rules": plan.broken_rules,
        "as_written": None if plan.as_written is None else one(plan.as_written),
        "best": [one(estimate) for estimate in plan.best(top)],
        "too_big": [one(estimate) for estimate in plan.best_too_big(top)],
        "refused": {field: {"layouts": n, "rule": text} for field, (n, text) in plan.refused.items()},
        "inputs": {name: asdict(value) for name, value in plan.machine.inputs().items()},
        "taken_for_granted": [*ASSUMPTIONS, *notes(plan)],
        "points": [asdict(point) for point in points],
    }


def points_table(points: list[Point], gpu_hour_usd: float | None) -> Table:
    """Return the points of the plot."""
    table = Table(title="the best layout that fits, for other GPUs and context lengths", title_justify="left")
    table.add_column("attention")
    price = "GPU-hours" if gpu_hour_usd is None else "USD"
    for name in ("GPUs", "tokens a sequence", "tokens/s", f"{price} a billion tokens"):
        table.add_column(name, justify="right")
    table.add_column("layout, or why there is none", overflow="fold")
    for point in points:
        hours, speed = point.gpu_hours_per_billion, point.tokens_per_s
        numbers = ["", ""]
        if hours is not None and speed is not None:
            numbers = [f"{speed:,.0f}", f"{hours * (gpu_hour_usd or 1.0):,.1f}"]
        table.add_row(
            point.attention, f"{point.gpus:,}", f"{point.seq_len_tokens:,}", *numbers, Text(point.layout)
        )
    return table


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write what `as_json` returns."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _layouts(plan: Plan, best: list[Estimate], top: int, gpu_hour_usd: float | None) -> Table:
    config = plan.config
    batch, length = config.optim.global_batch_sequences, config.data.seq_len_tokens
    gpus = world_size(config)
    table = Table(
        title=f"{config.run.name}: {gpus} GPU{'s' if gpus > 1 else ''}, {batch} sequences of {length:,} "
        f"tokens a step; a run may take {plan.machine.usable_gib:g} of {plan.machine.memory_gib:g} GiB",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("layout")
    names = ["GiB", "s/step", "tokens/s", "MFU", *(["USD/M tokens"] if gpu_hour_usd is not None else [])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("the step is, or why not", overflow="fold")

    def row(name: str, estimate: Estimate, why: str) -> None:
        numbers = [
            f"{estimate.memory.total_gib:.1f}",
            f"{estimate.time.step_s:.2f}",
            f"{estimate.tokens_per_s:,.0f}",
            f"{estimate.utilization_frac:.1%}",
        ]
        if gpu_hour_usd is not None:
            numbers.append(f"{estimate.usd_per_million_tokens(config, gpu_hour_usd):.4f}")
        table.add_row(name, layout_text(estimate), *numbers, Text(why))

    if plan.as_written is not None:
        why = what_takes_the_step(plan.as_written)
        row("as written", plan.as_written, why if plan.as_written.fits else _out_of_memory(plan.as_written))
        table.add_section()
    for number, estimate in enumerate(best, 1):
        row(str(number), estimate, what_takes_the_step(estimate))
    table.add_section()
    for estimate in plan.best_too_big(top):
        row("too big", estimate, _out_of_memory(estimate))
    return table


def _out_of_memory(estimate: Estimate) -> str:
    return f"out of memory by {estimate.over_gib:.1f} GiB at the {estimate.memory.moment}"


def _memory(estimate: Estimate, plan: Plan) -> Table:
    memory = estimate.memory
    table = Table(title="1: memory of the fullest GPU, GiB", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    parts = (
        ("weights", memory.weights_gib),
        ("gradients", memory.grads_gib),
        ("optimizer state", memory.optimizer_gib),
        ("activations of micro-batches in flight", memory.activations_gib),
        ("gathered keys and values", memory.gathered_kv_gib),
        (f"working memory at the fullest moment ({memory.moment})", memory.working_gib),
    )
    for name, size in parts:
        table.add_row(name, f"{size:.2f}")
    table.add_section()
    table.add_row("sum", f"{memory.total_gib:.2f}")
    table.add_row("left free", f"{plan.machine.reserve_gib.value:.2f}")
    table.add_section()
    details = (
        ("logits and softmax, at the loss", memory.logits_gib),
        ("recomputed, in a layer's backward pass", memory.recomputed_gib),
        ("pooled keys, in a layer's forward pass", memory.pooled_keys_gib),
        ("kernel workspace, in a layer's backward pass", memory.kernel_workspace_gib),
        ("temporaries of the optimizer's step", memory.optimizer_step_gib),
    )
    for name, size in details:
        table.add_row(name, f"{size:.2f}", style="dim")
    return table


def _sent(estimate: Estimate, plan: Plan) -> Table:
    table = Table(title="1: sent by one GPU in a step", title_justify="left")
    table.add_column("what")
    for name in ("GB", "messages", "processes", "of them on a host", "at GB/s"):
        table.add_column(name, justify="right")
    for traffic in estimate.sent.all():
        if traffic.step_bytes:
            table.add_row(
                traffic.name,
                f"{traffic.step_bytes / 1e9:.2f}",
                f"{traffic.messages:,.0f}",
                str(traffic.size),
                str(plan.machine.members_on_host(traffic.size, traffic.stride)),
                f"{plan.machine.bytes_per_s(traffic.size, traffic.stride) / 1e9:.0f}",
            )
    return table


def _step(estimate: Estimate) -> Table:
    table = Table(title=f"1: a step of {estimate.time.step_s:.2f} s", title_justify="left")
    table.add_column("what")
    table.add_column("share", justify="right")
    for name, share in estimate.time.shares().items():
        if share:
            table.add_row(name, f"{share:.1%}")
    return table


def _refused(plan: Plan) -> Table:
    table = Table(title="layouts that the rules refuse", title_justify="left")
    table.add_column("layouts", justify="right")
    table.add_column("for example", overflow="fold")
    for count, example in plan.refused.values():
        table.add_row(str(count), Text(example))
    return table


def _inputs(plan: Plan) -> Table:
    table = Table(title="what the plan rests on", title_justify="left")
    table.add_column("input", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("")
    table.add_column("source", overflow="fold")
    for name, given in plan.machine.inputs().items():
        table.add_row(name, f"{given.value:g} {given.unit}", given.kind.value, Text(given.source))
    return table
