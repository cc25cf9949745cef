"""Why a layout is where it is: what fills its memory and its step, and what a change of one size would do."""

from __future__ import annotations

from dataclasses import replace

from phsa_megatron.config.planning.search import Estimate, Layout, Plan

_FIELDS = {
    "tensor_size": "TP",
    "pipeline_size": "PP",
    "context_size": "CP",
    "micro_batch_sequences": "micro-batch",
    "recompute": "recompute",
}
_WORDS = {
    "products": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise passes",
    "recompute": "recomputation",
    "host": "waiting for Python",
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "pipeline": "sends between stages",
    "data": "gradients and weights between copies",
    "bubble": "the pipeline's bubble",
    "optimizer": "the optimizer's step",
}


def layout_text(estimate: Estimate) -> str:
    """Return a layout in short: TP2 CP4 DP1, micro-batch 1, recompute none."""
    layout = estimate.layout
    sizes = {"TP": layout.tensor_size, "PP": layout.pipeline_size, "CP": layout.context_size}
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    if layout.virtual_pipeline_size is not None:
        parts.append(f"VPP{layout.virtual_pipeline_size}")
    parts.append(f"DP{estimate.data_size}")
    return (
        f"{' '.join(parts)}, micro-batch {layout.micro_batch_sequences}, recompute {layout.recompute.value}"
    )


def what_takes_the_step(estimate: Estimate, most: int = 3) -> str:
    """Return the largest parts of a step."""
    shares = list(estimate.time.shares().items())[:most]
    return ", ".join(f"{_WORDS[name]} {share:.0%}" for name, share in shares)


def what_fills_memory(estimate: Estimate) -> str:
    """Return the largest parts of the fullest GPU."""
    memory = estimate.memory
    parts = {
        "weights": memory.weights_gib,
        "gradients": memory.grads_gib,
        "optimizer state": memory.optimizer_gib,
        "activations": memory.activations_gib,
        "gathered keys and values": memory.gathered_kv_gib,
        f"working memory ({memory.moment})": memory.working_gib,
    }
    largest = sorted(parts.items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {size:.1f} GiB" for name, size in largest)


def reasons(estimate: Estimate, plan: Plan, most: int = 4) -> list[str]:
    """Return sentences about a layout: what binds it, and its neighbours that differ in one size only.

    Faster neighbours come first, with what keeps them out; then the slower ones, the nearest first.
    """
    known = plan.by_layout()
    room = -estimate.over_gib
    lines = [
        f"takes {estimate.memory.total_gib:.1f} GiB ({what_fills_memory(estimate)}), "
        + (f"{room:.1f} GiB below" if room >= 0 else f"{-room:.1f} GiB above")
        + f" the {plan.machine.usable_gib:g} GiB that a run may take; its step is "
        + what_takes_the_step(estimate)
    ]
    neighbours = []
    for field, name in _FIELDS.items():
        others = [
            other
            for layout, other in known.items()
            if layout != estimate.layout and _only_differs_in(field, layout, estimate.layout)
        ]
        if others:
            nearest = min(
                others, key=lambda other: (not _faster(other, estimate), _distance(other, estimate))
            )
            neighbours.append((name, field, nearest))
    neighbours.sort(key=lambda item: (not _faster(item[2], estimate), _distance(item[2], estimate)))
    return lines + [_neighbour(name, field, other, estimate) for name, field, other in neighbours[:most]]


def _only_differs_in(field: str, one: Layout, other: Layout) -> bool:
    same = {field: getattr(other, field)}
    if field == "pipeline_size":
        same["virtual_pipeline_size"] = other.virtual_pipeline_size
    return replace(one, **same) == other


def _faster(one: Estimate, other: Estimate) -> bool:
    return one.tokens_per_s > other.tokens_per_s


def _distance(one: Estimate, other: Estimate) -> float:
    return abs(one.tokens_per_s / other.tokens_per_s - 1)


def _neighbour(name: str, field: str, other: Estimate, estimate: Estimate) -> str:
    value = getattr(other.layout, field)
    ratio = other.tokens_per_s / estimate.tokens_per_s
    speed = f"{ratio - 1:.0%} faster" if ratio > 1 else f"{1 - ratio:.0%} slower"
    if not other.fits:
        return f"{name} {value} instead: {speed}, and {other.over_gib:.1f} GiB more than there is"
    mine, theirs = estimate.time.shares(), other.time.shares()
    grown = max(theirs, key=lambda part: theirs[part] / ratio - mine[part])
    gap = other.memory.total_gib - estimate.memory.total_gib
    memory = f"{abs(gap):.1f} GiB {'more' if gap > 0 else 'less'}"
    if ratio > 1:
        return f"{name} {value} instead: {speed}, with {memory}"
    return f"{name} {value} instead: {speed} ({_WORDS[grown]} takes {theirs[grown]:.0%}), with {memory}"
