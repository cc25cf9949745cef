"""The one table of everything a run logs: name, unit, reduction and meaning.

A name that is not in the table is refused when it is logged, so no number without a meaning reaches a file.
`docs/metrics.md` is this table as Markdown:

    python -m phsa_megatron.monitoring.metrics > docs/metrics.md
"""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass

DOMAIN = "<domain>"
LAYER = "<n>"
BUCKET = "<m>"
BLOCK = "<block>"
STEP_AXIS = "progress/step"
"""The name of the step axis in W&B; in `metrics.jsonl` it is the record's own `step`."""

LAUNCH = "progress/launch"
"""Which start of the run a row is of, in W&B: what a killed launch saw stays apart from what counts."""

_PLACEHOLDER_PATTERNS = {
    DOMAIN: r"[^/\s]+",
    LAYER: r"\d+",
    BUCKET: r"\d+",
    BLOCK: r"embedding|layer_\d+|final_norm|mtp_\d+|output",
}


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Attributes:
        name: What is logged; `<domain>`, `<n>`, `<m>` and `<block>` stand for a validation domain, numbers
            and a part of the model.
        unit: The unit of the value.
        reduction: How one value comes out of many tokens, steps or processes.
        meaning: One sentence for a person.
    """

    name: str
    unit: str
    reduction: str
    meaning: str

    def matches(self, name: str) -> bool:
        """Tell whether `name` is this row or one of the names its pattern stands for."""
        return self._pattern().fullmatch(name) is not None

    def capture(self, name: str) -> str | None:
        """Return what stands at the row's first placeholder in `name`; None without a match or one."""
        match = self._pattern().fullmatch(name)
        return match[1] if match and match.re.groups else None

    @property
    def pattern(self) -> str:
        """Return a regular expression of the names that the row stands for."""
        pattern = re.escape(self.name)
        for placeholder, expression in _PLACEHOLDER_PATTERNS.items():
            pattern = pattern.replace(re.escape(placeholder), f"({expression})")
        return pattern

    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.pattern)


_TOKEN_MEAN = "mean over the loss tokens of all processes"
_LAST = "value at the logged step"
_WINDOW = "over the last updates of this process"
_EVAL_MEAN = "mean over the evaluated queries, heads and processes"
_SHAPE_MEAN = "mean over the selected blocks of the evaluated queries, heads, micro-batches and processes"
_SAMPLED = "over sampled queries, heads and processes, every monitoring.information_every_steps steps"
_INFORMATION = {
    "kept_mass_frac": "Share of the full causal softmax on the keys that are attended to",
    "window_mass_frac": "Share of the full causal softmax on the init and local windows alone",
    "oracle_mass_frac": "The share that the best k blocks by true mass would keep, windows included",
    "block_recall_frac": "Share of the best k blocks by true mass that are among the chosen ones",
    "oracle_gain_frac": "Share of what the best k blocks add to the windows that the chosen ones add",
}

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(STEP_AXIS, "steps", _LAST, "Optimizer steps done: the horizontal axis of every other metric."),
        Metric(
            LAUNCH,
            "launches",
            _LAST,
            "Number of the start of the run, from 1; in W&B only: steps made again after a restart have the "
            "later number, and the higher one counts.",
        ),
        Metric(
            "progress/consumed_tokens",
            "tokens",
            "sum since step 0 over all processes",
            "Tokens trained on since the start of the run, restarts included.",
        ),
        Metric(
            "progress/eta_s", "s", _WINDOW, "Time left at the current speed, without evaluations and saves."
        ),
        Metric("train/loss_nats", "nats/token", _TOKEN_MEAN, "Next-token cross-entropy of the step's batch."),
        Metric(
            "train/align_loss",
            "1",
            "mean over tokens, layers and features of all processes",
            "SSA's alignment of sparse and full attention outputs, before attention.align_coeff: twice their "
            "smooth L1, once for each direction. Not in train/loss_nats; logged where it is trained.",
        ),
        Metric(
            "train/index_kl_nats",
            "nats",
            "mean over tokens, layers and key-value heads of all processes",
            "KL divergence of the block indexer from dense attention's mass of the candidate blocks, before "
            "attention.indexer_coeff; a query without a choice counts as 0. Not in train/loss_nats; logged "
            "with attention.selector=indexer.",
        ),
        Metric("optim/lr", "1", _LAST, "Learning rate used by the step."),
        Metric(
            "optim/grad_norm",
            "1",
            "global L2 norm, before clipping",
            "Norm of the gradient of all weights; compare with optim.clip_grad_norm.",
        ),
        Metric(
            "optim/num_zeros",
            "elements",
            "sum over all weights",
            "Gradient elements that are exactly zero: a cheap checksum over all gradients.",
        ),
        Metric(
            "optim/<block>/grad_norm",
            "1",
            "L2 norm over the block's weights, before clipping, every monitoring.norms_every_steps steps",
            "Norm of the gradient of the embedding, of a layer, of the final norm or of the output layer.",
        ),
        Metric(
            "optim/<block>/param_norm",
            "1",
            "L2 norm over the block's weights, every monitoring.norms_every_steps steps",
            "Norm of the weights of a block, after the update.",
        ),
        Metric("perf/step_time_s", "s", "mean over the steps since the last record", "Wall time of a step."),
        Metric("perf/data_wait_s", "s", "sum since the last record", "Time the step waited for its batch."),
        Metric("perf/tokens_per_s", "tokens/s", _WINDOW, "Training speed of all processes together."),
        Metric(
            "perf/mfu_selected_frac",
            "fraction",
            _WINDOW,
            "FLOPs the run's own attention needs for the documents that were read, of their real "
            "lengths and at the k of each step, over what the devices could do at cluster.peak_tflops. "
            "Left out without a peak; never above 1.",
        ),
        Metric(
            "perf/dense_equiv_tflops",
            "TFLOP/s per device",
            _WINDOW,
            "FLOPs that full causal attention would have needed for the same documents: speed, not "
            "utilization.",
        ),
        Metric(
            "perf/goodput_frac",
            "fraction",
            "over all launches, up to the record",
            "Share of the wall time since the run's first launch that went into steps that count: a step "
            "made again after a restart counts once; starts, evaluations, saves and the time between "
            "launches do not. `phsa-launch status` prints the same.",
        ),
        *(
            Metric(
                f"perf/{phase}_s",
                "s",
                "mean over processes and over the steps since the last record",
                f"Time in {what}; on a GPU by the device's clock. Waiting for others in it is included.",
            )
            for phase, what in (
                ("forward", "the forward passes of a step"),
                (
                    "backward",
                    "the backward passes of a step, recomputation and overlapped reduction included",
                ),
                ("optimizer", "a step's gradient norm, clipping, update and gathering of weights"),
            )
        ),
        Metric(
            "perf/communication_s",
            "s",
            "mean over processes and over the steps since the last record",
            "Time a step stood in communication that it waited for: blocking collectives, and of those "
            "beside computation the wait alone; waiting for slower processes included; on a GPU by the "
            "device's clock. A part of the three times above (and of the wait for a pipeline's first input), "
            "not to be added to them. Without that of passes that compute.cuda_graphs replays. Not logged "
            "by one process.",
        ),
        Metric(
            "perf/slowest_ratio",
            "ratio",
            "largest over processes, since the last record",
            "Own time of a process (its data and forward passes) over the median of its pipeline stage: "
            "1 is even; what is far above holds all others up.",
        ),
        Metric("perf/slowest_rank", "rank", "that of perf/slowest_ratio", "The process with that ratio."),
        Metric(
            "perf/context_sent_bytes_per_layer",
            "bytes",
            "mean over processes, layers, micro-batches and steps since the last record",
            "Sent to other context-parallel processes in training: forward, recomputation and backward.",
        ),
        Metric(
            "perf/context_sent_across_nodes_bytes_per_layer",
            "bytes",
            "mean over processes, layers, micro-batches and steps since the last record",
            "The part of the former that went to other nodes; logged with parallel.context_node_size.",
        ),
        Metric("memory/peak_gib", "GiB", "max over processes", "Peak memory of a process since it started."),
        Metric(
            "data/overflow_tokens",
            "tokens",
            "sum over all processes since the last record",
            "Tokens without loss because their sequence holds more documents than the boundary tensor.",
        ),
        Metric("val/loss_nats", "nats/token", "mean over all validation tokens", "Validation cross-entropy."),
        Metric(
            "val/<domain>/loss_nats",
            "nats/token",
            "mean over the domain's validation tokens",
            "Validation cross-entropy of one domain.",
        ),
        Metric(
            "val/<domain>/bits_per_byte",
            "bits/byte",
            "sum of bits over sum of UTF-8 bytes",
            "Validation cross-entropy per byte of text: comparable between tokenizers.",
        ),
        Metric("val/eval_s", "s", "wall time of one evaluation", "Time the evaluation took."),
        Metric(
            "attention/layer_<n>/selected_mass_frac",
            "fraction",
            _EVAL_MEAN,
            "Share of the attention probability that lies on the selected (top-k) blocks, outside the init "
            "and local windows, in layer n counted from 1.",
        ),
        Metric(
            "attention/layer_<n>/attended_key_frac",
            "fraction",
            "sum of keys over sum of keys, of the evaluated queries, heads and processes",
            "Keys attended to, over the keys that full causal attention would have seen, in layer n.",
        ),
        Metric(
            "attention/frac_queries_with_more_candidates_than_k",
            "fraction",
            _EVAL_MEAN,
            "Queries that had to choose: more candidate blocks than top-k. Near 0, PHSA is only dense.",
        ),
        Metric(
            "attention/block_punctuation_frac",
            "fraction",
            "mean over the complete blocks of the evaluated text",
            "Share of punctuation among the tokens of all blocks: what the selected ones compare with.",
        ),
        *(
            Metric(f"attention/layer_<n>/{name}", unit, _SHAPE_MEAN, meaning)
            for name, unit, meaning in (
                (
                    "selected_punctuation_frac",
                    "fraction",
                    "Share of punctuation among the tokens of the selected blocks, in layer n.",
                ),
                (
                    "selected_distance_blocks",
                    "blocks",
                    "Distance of a selected block from the query's own, in layer n.",
                ),
                (
                    "neighbour_overlap_frac",
                    "fraction",
                    "Share of a query's selected blocks that the query before it selected too, in layer n.",
                ),
                (
                    "selection_entropy_frac",
                    "fraction",
                    "Entropy of which blocks of a document are selected, over that of all its candidates "
                    "alike, in layer n: near 0, all queries select the same few blocks. Under context "
                    "parallelism the mean over processes, each of its own queries.",
                ),
            )
        ),
        Metric(
            "attention/distance_log2_<m>_frac",
            "fraction",
            _SHAPE_MEAN + " and layers",
            "Share of the selected blocks that are 2^m to 2^(m+1) - 1 blocks away (m = 15: or further).",
        ),
        Metric(
            "attention/layer_<n>/distance_log2_<m>_frac",
            "fraction",
            _SHAPE_MEAN,
            "The same in layer n, as far as any layer selects.",
        ),
        *(
            Metric(
                f"attention/{where}distance_histogram",
                "blocks",
                f"that of attention/{where}distance_log2_<m>_frac",
                "Those shares as one histogram over the distance; in W&B only.",
            )
            for where in ("", "layer_<n>/")
        ),
        Metric(
            "attention/topk",
            "blocks",
            "mean over the layers, at the logged step",
            "Selected blocks per query (k) where they change over the steps; 0 is full causal attention.",
        ),
        *(
            Metric(f"attention/{where}{name}", "fraction", _SAMPLED, meaning + there)
            for where, there in (("", "."), ("layer_<n>/", ", in layer n."))
            for name, meaning in _INFORMATION.items()
            if not (where and name in ("window_mass_frac", "oracle_mass_frac"))
        ),
        *(
            Metric(
                f"attention/{where}max_logit",
                "1",
                "max over sampled queries, all their heads and processes, every "
                "monitoring.max_logit_every_steps steps",
                "Largest scaled product of a sampled query with a key of its document up to itself, attended "
                f"to or not{there}: no more than the largest of all queries; what grows without bound ends "
                "in a softmax of one key.",
            )
            for where, there in (("", ""), ("layer_<n>/", ", in layer n"))
        ),
        Metric(
            "checkpoint/save_s",
            "s",
            "wall time on rank 0",
            "Time training stood still for a save.",
        ),
    )
}
"""Every metric by name, in the order of the documentation."""


def lookup(name: str) -> Metric:
    """Return the table's row for a logged name.

    Args:
        name: A full name such as `train/loss_nats` or `val/prose/bits_per_byte`.

    Returns:
        The row, which may be a pattern.

    Raises:
        ValueError: The table has no such name; the message gives the nearest one.
    """
    if name in METRICS and not any(mark in name for mark in _PLACEHOLDER_PATTERNS):
        return METRICS[name]
    for metric in METRICS.values():
        if metric.matches(name) and not any(mark in name for mark in _PLACEHOLDER_PATTERNS):
            return metric
    nearest = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)
    raise ValueError(
        f"metric {name!r} is not in the metrics table; nearest: {nearest[0]!r}. "
        "Log a name of METRICS in phsa_megatron/monitoring/metrics.py or add a row there."
    )


def render_markdown() -> str:
    """Render the table as the Markdown page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "Generated from `phsa_megatron/monitoring/metrics.py`; do not edit by hand:",
        "",
        "    python -m phsa_megatron.monitoring.metrics > docs/metrics.md",
        "",
        "`<domain>` stands for a validation domain, `<n>` and `<m>` for numbers, `<block>` for embedding, "
        "layer_1, layer_2, ..., final_norm, mtp_1 or output. Values are written at full "
        "precision to `metrics.jsonl` in the run folder; W&B and `report.html` show the same values.",
        "",
        "| name | unit | reduction | meaning |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{m.name}` | {m.unit} | {m.reduction} | {m.meaning} |" for m in METRICS.values()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
