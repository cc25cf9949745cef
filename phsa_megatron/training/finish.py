"""The end of a run: summary, samples, report, and the marker that says it is done."""

from __future__ import annotations

import json
from typing import Any

from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.schema import AttentionKind
from phsa_megatron.data.unigram import CrossEntropy, measure_baseline
from phsa_megatron.inference.generate import generate
from phsa_megatron.monitoring.recorder import environment
from phsa_megatron.monitoring.report import write_report
from phsa_megatron.training.evaluate import CHOICE_METRIC, Evaluation
from phsa_megatron.training.run import Run

MAX_BASELINE_TOKENS = 1 << 28
"""Training sets up to this many tokens are counted for the baselines: some minutes on one process."""
_SAMPLE_TEMPERATURE = 0.8


def finish(run: Run, evaluation: Evaluation) -> None:
    """Writes what a finished run leaves behind. All processes call it.

    Args:
        run: all steps trained, the last checkpoint committed.
        evaluation: of the final weights.
    """
    run.progress.enter("finish")
    samples = _samples(run)
    run.meter.stop(run.state)
    if run.groups.rank == 0:
        content = summary(run, evaluation, _baseline(run), samples)
        text = json.dumps(content, ensure_ascii=False, indent=2)
        write_atomically(run.folder.summary_file, text + "\n")
    run.notify(
        "end",
        f"done: {run.state.step} steps, final validation loss {evaluation.total.nats_per_token:.4f} "
        f"nats/token; summary in {run.folder.summary_file}",
        step=run.state.step,
        reason="all steps are trained",
    )
    write_report_if_asked(run)
    if run.groups.rank == 0:
        # Last: whoever sees it may take everything else for complete.
        write_atomically(run.folder.done, f"{run.state.step}\n")
    run.groups.barrier()


def summary(
    run: Run, evaluation: Evaluation, baseline: CrossEntropy | None, samples: list[dict[str, str]]
) -> dict[str, Any]:
    """Returns the content of summary.json; what was not measured is null."""
    config, state = run.config, run.state
    phsa = config.attention.kind is AttentionKind.phsa
    where = environment()
    return {
        "name": config.run.name,
        "final_val_loss_nats": evaluation.total.nats_per_token,
        "unigram_entropy_nats": baseline.unigram_nats if baseline else None,
        "bigram_entropy_nats": baseline.bigram_nats if baseline else None,
        "loss_over_unigram_frac": (
            evaluation.total.nats_per_token / baseline.unigram_nats if baseline else None
        ),
        "val_bits_per_byte": evaluation.total.bits_per_byte,
        "val_by_domain": {
            domain: {
                "loss_nats": loss.nats_per_token,
                "bits_per_byte": loss.bits_per_byte,
                "tokens": loss.num_tokens,
                "bytes": loss.num_bytes,
            }
            for domain, loss in evaluation.domains.items()
        },
        "steps": state.step,
        "tokens": state.consumed_tokens,
        "sequences": state.consumed_sequences,
        "wall_s": state.wall_s,
        "attention": config.attention.kind.value,
        "attention_impl": config.attention.impl.value if phsa else None,
        "topk": config.attention.train_topk if phsa else None,
        "topk_evaluated": run.derived.topk_inference if phsa else None,
        "frac_queries_with_more_candidates_than_k": evaluation.selection.get(CHOICE_METRIC),
        "punctuation": {"name": run.table.name, "sha256": run.table.sha256},
        "samples": samples,
        "device": run.groups.device.type,
        "dtype": config.run.dtype.value,
        "world_size": run.groups.world_size,
        "host": where["host"],
        "python": where["python"],
        "packages": where["packages"],
    }


def write_report_if_asked(run: Run) -> None:
    """Writes RUN/report.html on process 0, unless `monitoring.report` is off."""
    if run.config.monitoring.report and run.groups.rank == 0:
        run.console.message(f"report: {write_report(run.folder)}")


def _baseline(run: Run) -> CrossEntropy | None:
    """Returns what counting the training text reaches on the validation tokens; process 0 only."""
    order = run.train_reader.order
    num_tokens = sum(order.source(name).num_tokens for name in order.source_names())
    if num_tokens > MAX_BASELINE_TOKENS:
        run.console.message(
            f"unigram and bigram entropy are left out: {num_tokens:,} training tokens are more than the "
            f"{MAX_BASELINE_TOKENS:,} that are counted at the end of a run"
        )
        return None
    baseline = measure_baseline(run.config).overall
    run.recorder.event(
        "baselines",
        unigram_entropy_nats=baseline.unigram_nats,
        bigram_entropy_nats=baseline.bigram_nats,
    )
    return baseline


def _samples(run: Run) -> list[dict[str, str]]:
    """Continues the recipe's prompts. All processes call it: the model may be spread over them."""
    samples = []
    with run.parts.gathered_parameters():
        for i, prompt in enumerate(run.config.run.sample_prompts):
            ids = generate(
                run.parts.model,
                run.tokenizer.encode(prompt) or [run.tokenizer.eod_id],
                run.config.run.sample_num_tokens,
                config=run.config,
                groups=run.groups,
                table=run.table,
                vocab_size=run.tokenizer.vocab_size,
                eod_id=run.tokenizer.eod_id,
                temperature=_SAMPLE_TEMPERATURE,
                seed=run.config.run.seed + i,
            )
            text = run.tokenizer.decode([i for i in ids if i != run.tokenizer.eod_id])
            samples.append({"prompt": prompt, "text": text})
    run.recorder.samples(run.state.step, samples)
    return samples
