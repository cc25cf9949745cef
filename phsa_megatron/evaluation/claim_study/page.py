"""The page of the claim study, from the records of its units alone: nothing in it is written by hand."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from statistics import mean

from phsa_megatron.config.errors import TrainingError
from phsa_megatron.evaluation import plots
from phsa_megatron.evaluation.claim_study.measure import POSITION_EDGES
from phsa_megatron.evaluation.claim_study.retrieval import DEPTHS, TASKS
from phsa_megatron.evaluation.claim_study.units import MAIN, TOPKS, VARIANTS
from phsa_megatron.evaluation.claim_study.verdicts import (
    Question,
    Record,
    answer_question,
    difference,
    loss_question,
    mean_and_spread,
    needle_question,
    own_view,
    seed_limit,
)

ENGLISH = loss_question("loss, English", lambda domain: domain.startswith("english"))
CHINESE = loss_question("loss, Chinese", lambda domain: domain.startswith("chinese"))
LOSSES = (ENGLISH, CHINESE)
NEEDLES = tuple(needle_question(f"needles, {task.replace('_', ' ')}", task=task) for task in TASKS)
ALL_NEEDLES = needle_question("needles, all tasks")
ENGLISH_NEEDLES = needle_question("needles, English", language="english")
CHINESE_NEEDLES = needle_question("needles, Chinese", language="chinese")
ANSWERS = answer_question("answers")
_COMPARISONS: tuple[tuple[str, str, str, tuple[Question, ...]], ...] = (
    ("Does punctuation beat the plain mean?", "phsa_en_zh", "mean_pool", (*LOSSES, ALL_NEEDLES, ANSWERS)),
    ("And English punctuation alone, on English?", "phsa", "mean_pool", (ENGLISH, ENGLISH_NEEDLES)),
    ("Does it beat InfLLM-V2's pooling?", "phsa_en_zh", "infllm_v2", (*LOSSES, ALL_NEEDLES, ANSWERS)),
    ("Does it beat random tokens?", "phsa_en_zh", "random_tokens", (*LOSSES, ALL_NEEDLES, ANSWERS)),
    ("What does English-only P cost on Chinese?", "phsa", "phsa_en_zh", (CHINESE, CHINESE_NEEDLES)),
    ("How far is it from dense?", "phsa_en_zh", "dense", (*LOSSES, ALL_NEEDLES, ANSWERS)),
    ("How far is the plain mean from dense?", "mean_pool", "dense", (*LOSSES, ALL_NEEDLES, ANSWERS)),
)


def read_records(path: Path) -> list[Record]:
    """Returns the records of a folder of units, or of a .jsonl.xz file that a page left.

    Raises:
        TrainingError: there is none, or units of a seed had other weights, data or budgets.
    """
    if path.is_file():
        with lzma.open(path, "rt", encoding="utf-8") as stream:
            records = [json.loads(line) for line in stream]
    else:
        records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))]
    if not records:
        raise TrainingError(f"{path} holds no record of a finished unit: phsa-train claim-study run")
    for key in ("tokens", "measures"):
        everywhere = {json.dumps(record[key]) for record in records}
        if len(everywhere) > 1:
            raise TrainingError(f"units differ in {key} ({', '.join(sorted(everywhere))})")
    for key in ("first_weights_sha256", "data_fingerprint"):
        by_seed: dict[int, set[str]] = {}
        for record in records:
            by_seed.setdefault(record["seed"], set()).add(json.dumps(record[key]))
        for seed, found in by_seed.items():
            if len(found) > 1:
                raise TrainingError(f"seed {seed}: units differ in {key} ({', '.join(sorted(found))})")
    order = list(VARIANTS)
    return sorted(
        records,
        key=lambda r: (
            order.index(r["variant"]) if r["variant"] in order else len(order),
            r["variant"],
            r["seed"],
        ),
    )


def write_page(units: Path, page: Path) -> str:
    """Writes PAGE.md, PAGE_*.png and PAGE_units.jsonl.xz, and returns what was written.

    Args:
        units: folder of records, or a file of them.
        page: path without its ending.
    """
    records = read_records(units)
    page.parent.mkdir(parents=True, exist_ok=True)
    raw = page.with_name(f"{page.name}_units.jsonl.xz")
    if not units.is_file() or units.resolve() != raw.resolve():
        with lzma.open(raw, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    by_variant: dict[str, list[Record]] = {}
    for record in records:
        by_variant.setdefault(record["variant"], []).append(record)
    parts = [
        _head(by_variant, page),
        "## What follows from the numbers\n",
        *_verdicts(by_variant),
        _by_topk(by_variant),
        "\n## Every model with the attention that it was trained for\n",
        _main_table(by_variant),
        *_pictures(by_variant, page),
        "\n## Training k against inference k\n",
        *_matrices(by_variant),
        *_dense_evaluated_sparse(by_variant),
        "\n## By domain\n",
        _domains(by_variant),
        "\n## By position in the document\n",
        _positions(by_variant),
        "\n## Needles by length and depth\n",
        *_needle_tables(by_variant),
        "\n## Attention mass\n",
        _mass(by_variant),
        "\n## Cost\n",
        _cost(by_variant),
    ]
    page.with_suffix(".md").write_text("\n".join(parts) + "\n", encoding="utf-8")
    return f"written: {page}.md, {raw.name} and plots, from {len(records)} units"


def _head(by_variant: dict[str, list[Record]], page: Path) -> str:
    first = next(iter(by_variant.values()))[0]
    settings = first["settings"]
    seeds = {name: [r["seed"] for r in records] for name, records in by_variant.items()}
    short = [f"{name} ({len(s)})" for name, s in seeds.items() if name in MAIN and len(s) < 3]
    absent = [name for name in VARIANTS if name not in by_variant]
    commits = sorted({record["commit"][:12] for records in by_variant.values() for record in records})
    notes = []
    if short:
        notes.append(f"Fewer than three seeds: {', '.join(short)}.")
    if absent:
        notes.append(f"Not trained: {', '.join(absent)}.")
    return f"""\
# Does punctuation help, when a model is trained with it?

{first["parameters"]:,} parameters, {first["tokens"]:,} training tokens a model in {first["steps"]:,} steps \
of {settings["optim.global_batch_sequences"]} sequences of {settings["data.seq_len_tokens"]:,}, init \
{settings["attention.init_tokens"]} + local {settings["attention.local_tokens"]}, blocks of \
{settings["attention.block_tokens"]}, on {_devices(by_variant)}, commit {" and ".join(commits)}. \
Models of a seed start from the same weights and see the same text in the same order; only what chooses the \
blocks differs. A small model on a few tokens is no verdict about large ones. {" ".join(notes)}

Written by `phsa-train claim-study page --out {page.name}_units.jsonl.xz` from the records in that file; how \
they were made is in [claim_study.md](../claim_study.md). Losses are nats per token of held-out documents; a \
needle is found if greedy decoding gives all four digits. Mean ± standard deviation over seeds.
"""


def _devices(by_variant: dict[str, list[Record]]) -> str:
    return " and ".join(sorted({record["device"] for records in by_variant.values() for record in records}))


def _verdicts(by_variant: dict[str, list[Record]]) -> list[str]:
    lines = []
    for title, ours, theirs, questions in _COMPARISONS:
        if ours not in by_variant or theirs not in by_variant:
            lines.append(f"- **{title}** Not measured: {ours} and {theirs} are not both there.")
            continue
        lines.append(f"- **{title}** `{ours}` against `{theirs}`:")
        first, second = ([(r, own_view(r)) for r in by_variant[name]] for name in (ours, theirs))
        for question in questions:
            found = difference(question, first, second, seed_limit(question, by_variant))
            if found is None:
                lines.append(f"    - {question.name}: no seed in common")
                continue
            lines.append(
                f"    - {question.name}: {found.mean:+.4f} {question.unit} ({found.low:+.4f} to "
                f"{found.high:+.4f}; {found.evidence}): **{found.verdict}**"
            )
    return lines


def _by_topk(by_variant: dict[str, list[Record]]) -> str:
    """Returns PHSA minus the others at every k in inference, with the better and the worse in bold."""
    rows = []
    for other in ("mean_pool", "infllm_v2", "random_tokens", "phsa", "dense"):
        if other not in by_variant or "phsa_en_zh" not in by_variant:
            continue
        for question in (*LOSSES, ALL_NEEDLES):
            cells, limit = [], seed_limit(question, by_variant)
            for k in TOPKS:
                theirs = "dense" if other == "dense" else f"k{k}"
                found = difference(
                    question,
                    [(record, f"k{k}") for record in by_variant["phsa_en_zh"]],
                    [(record, theirs) for record in by_variant[other]],
                    limit,
                )
                if found is None:
                    cells.append("-")
                elif found.verdict.startswith(("better", "worse")):
                    cells.append(f"**{found.mean:+.4f}** ({found.verdict})")
                else:
                    cells.append(f"{found.mean:+.4f}")
            rows.append([other, question.name, *cells])
    head = ["`phsa_en_zh` minus", "quantity", *(f"k = {k}" for k in TOPKS)]
    return (
        "\nThe same at every k in inference, trained at k = 2; bold where the interval leaves 0 out, and "
        "a difference of one seed is more than another seed may do. "
        "About one interval in twenty does so by chance, here and above.\n\n" + _table(head, rows)
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _values(records: list[Record], question: Question, view: str | None = None) -> str:
    """Returns mean and spread over seeds, in a view or in the one that each model was trained for."""
    digits = 4 if question.lower_is_better else 3
    return mean_and_spread([question.value(r, view or own_view(r)) for r in records], digits)


def _main_table(by_variant: dict[str, list[Record]]) -> str:
    questions = (*LOSSES, *NEEDLES, ENGLISH_NEEDLES, CHINESE_NEEDLES, ANSWERS)
    head = ["trained with", "k", "seeds", *(q.name for q in questions)]
    rows = []
    for name, records in by_variant.items():
        k = own_view(records[0]).removeprefix("k")
        rows.append([name, k, str(len(records)), *(_values(records, q) for q in questions)])
    about = "".join(
        f"\n- `{name}`: {records[0]['about']}" for name, records in by_variant.items() if records[0]["about"]
    )
    note = ""
    if len({tuple(r["seed"] for r in records) for records in by_variant.values()}) > 1:
        note = (
            "\n\nNot all rows are of the same seeds, here and below: the differences above compare, "
            "as they are taken inside a seed."
        )
    return _table(head, rows) + note + "\n" + about


def _topk_views(record: Record) -> dict[int, str]:
    return {k: f"k{k}" for k in TOPKS if f"k{k}" in record["views"]}


def _matrices(by_variant: dict[str, list[Record]]) -> list[str]:
    parts = []
    for question in (*LOSSES, ALL_NEEDLES, ENGLISH_NEEDLES, CHINESE_NEEDLES):
        rows = []
        for name, records in by_variant.items():
            views = _topk_views(records[0])
            if not views:
                continue
            cells = [_values(records, question, view) for view in views.values()]
            trained = str(records[0]["settings"]["attention.train_topk"])
            dense = _values(records, question, "dense")
            rows.append([name, trained, *cells, dense])
        head = ["trained with", "k in training", *(f"k = {k}" for k in TOPKS), "all keys"]
        parts.append(f"{question.name}:\n\n{_table(head, rows)}\n")
    return parts


def _dense_evaluated_sparse(by_variant: dict[str, list[Record]]) -> list[str]:
    records = by_variant.get("dense", [])
    selectors = list(dict.fromkeys(v.split("/")[0] for r in records for v in r["views"] if "/" in v))
    if not selectors:
        return []
    parts = ["\n## Trained dense, evaluated with a selector\n"]
    for question in (*LOSSES, ALL_NEEDLES):
        rows = []
        for selector in selectors:
            have = [r for r in records if f"{selector}/k{TOPKS[0]}" in r["views"]]
            views = [f"{selector}/k{k}" for k in TOPKS]
            cells = [_values(have, question, view) for view in views]
            rows.append([selector, *cells, _values(have, question)])
        head = ["evaluated with", *(f"k = {k}" for k in TOPKS), "all keys"]
        parts.append(f"{question.name}:\n\n{_table(head, rows)}\n")
    return parts


def _domains(by_variant: dict[str, list[Record]]) -> str:
    first = next(iter(by_variant.values()))[0]
    domains = sorted(first["views"][own_view(first)]["nats_and_tokens_by_sequence"])
    questions = [loss_question(domain, domain.__eq__) for domain in domains]
    rows = [[name, *(_values(records, q) for q in questions)] for name, records in by_variant.items()]
    return _table(["trained with", *domains], rows)


def _positions(by_variant: dict[str, list[Record]]) -> str:
    starts = (0, *POSITION_EDGES)
    rows = []
    for language in ("english", "chinese"):
        for name, records in by_variant.items():
            cells = []
            for place in range(len(starts)):
                values = []
                for record in records:
                    found = record["views"][own_view(record)]["nats_and_tokens_by_position"]
                    sums = [s[place] for domain, s in found.items() if domain.startswith(language)]
                    tokens = sum(count for _, count in sums)
                    if tokens:
                        values.append(sum(nats for nats, _ in sums) / tokens)
                cells.append(mean_and_spread(values, 3))
            rows.append([language, name, *cells])
    head = ["text", "trained with", *(f"from {start:,}" for start in starts)]
    return _table(head, rows)


def _needle_tables(by_variant: dict[str, list[Record]]) -> list[str]:
    first = next(iter(by_variant.values()))[0]
    lengths = sorted({cell["length_tokens"] for cell in first["views"][own_view(first)]["needles"]})
    parts = []
    for task in TASKS:
        by_length = [needle_question(str(n), task=task, length_tokens=n) for n in lengths]
        by_depth = [needle_question(str(d), task=task, depth_frac=d) for d in DEPTHS]
        questions = [*by_length, *by_depth]
        rows = [[name, *(_values(records, q) for q in questions)] for name, records in by_variant.items()]
        head = ["trained with", *(f"{n:,} tokens" for n in lengths), *(f"depth {d}" for d in DEPTHS)]
        parts.append(f"{task.replace('_', ' ')}:\n\n{_table(head, rows)}\n")
    return parts


def _mass(by_variant: dict[str, list[Record]]) -> str:
    rows = []
    for name, records in by_variant.items():
        view = own_view(records[0])
        for language in ("english", "chinese"):
            shares: dict[str, list[float]] = {}
            for record in records:
                found = record["views"][view]["mass"]
                for key in ("window_mass_frac", "kept_mass_frac", "oracle_mass_frac", "oracle_gain_frac"):
                    values = [
                        m[key] for d, m in found.items() if d.startswith(language) and m[key] is not None
                    ]
                    if values:
                        shares.setdefault(key, []).append(mean(values))
            if shares:
                rows.append([name, language, *(mean_and_spread(v, 3) for v in shares.values())])
    head = [
        "trained with",
        "text",
        "windows alone",
        "kept",
        "an oracle",
        "share of its gain over the windows",
    ]
    note = (
        "Share of the full softmax of the model's own queries and keys that attended tokens hold; each model "
        "has learned other queries and keys, so this compares a model with its own oracle first.\n\n"
    )
    return note + _table(head, rows)


def _cost(by_variant: dict[str, list[Record]]) -> str:
    rows, total_s = [], 0.0
    for name, records in by_variant.items():
        seconds = [sum(r["seconds"].values()) for r in records]
        total_s += sum(seconds)
        speed = [r["tokens"] / r["seconds"]["train"] for r in records]
        rows.append(
            [
                name,
                f"{records[0]['flops']:.3g}",
                f"{records[0]['sparsity_last_token_frac']:.2%}",
                f"{mean(speed):,.0f}",
                f"{mean(seconds):.0f}",
            ]
        )
    head = ["trained with", "FLOPs", "sparsity, last token", "tokens/s in training", "seconds a unit"]
    text = (
        f"\n\nAll units together: {total_s / 60:.1f} minutes, of processes several of which may have shared "
        f"a GPU, on {_devices(by_variant)}."
    )
    return _table(head, rows) + text


def _pictures(by_variant: dict[str, list[Record]], page: Path) -> list[str]:
    """Draws curves over the seeds that all variants have: means of different seeds would not compare."""
    seeds = set.intersection(*({r["seed"] for r in records} for records in by_variant.values()))
    if not seeds:
        return ["\nNo seed has all of these variants: no plots."]
    alike = {name: [r for r in records if r["seed"] in seeds] for name, records in by_variant.items()}
    lines = [f"\nPlots: the mean of the seeds that all variants have ({', '.join(map(str, sorted(seeds)))})."]
    for question, name in ((ENGLISH, "english"), (CHINESE, "chinese"), (ALL_NEEDLES, "needles")):
        series = {}
        for variant, records in alike.items():
            views = _topk_views(records[0])
            if views:
                series[variant] = {
                    k: mean([question.value(r, view) for r in records]) for k, view in views.items()
                }
        dense = {}
        if "dense" in alike:
            dense["dense"] = mean([question.value(r, "dense") for r in alike["dense"]])
        if series:
            path = page.with_name(f"{page.name}_{name}.png")
            unit = question.unit if question.lower_is_better else "share found"
            plots.curves(
                path, series, title=question.name, x_label="k in inference", y_label=unit, levels=dense
            )
            lines.append(f"\n![{question.name} by k]({path.name})")
    return lines
