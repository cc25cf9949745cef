"""The end of a run: summary, samples, report, and the marker that says it is done."""

from __future__ import annotations

import json
from typing import Any

from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.schema import AttentionKind
from phsa_megatron.inference.generate import generate
from phsa_megatron.monitoring.recorder import environment
from phsa_megatron.monitoring.report import write_report
from phsa_megatron.training.baselines import Baselines, measure_baselines
from phsa_megatron.training.evaluate import Evaluation
from phsa_megatron.training.run import Run

_CHOICE = "attention/frac_queries_with_more_candidates_than_k"


def finish(run: Run, evaluation: Evaluation) -> None:
    """Writes what a finished run leaves behind. All processes call it.

    Args:
        run: all steps trained, the last checkpoint committed.
        evaluation: of the final weights.
    """
    run.progress.phase = "finish"
    samples = _samples(run)
    run.meter.stop(run.state)
    if run.groups.rank == 0:
        baselines = measure_baselines(run.train_reader, run.evaluator.reader, run.state.consumed_sequences)
        run.recorder.event(
            "baselines",
            unigram_entropy_nats=baselines.unigram_entropy_nats,
            bigram_entropy_nats=baselines.bigram_entropy_nats,
        )
        text = json.dumps(summary(run, evaluation, baselines, samples), ensure_ascii=False, indent=2)
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
    run: Run, evaluation: Evaluation, baselines: Baselines, samples: list[dict[str, str]]
) -> dict[str, Any]:
    """Returns the content of summary.json."""
    config, state = run.config, run.state
    phsa = config.attention.kind is AttentionKind.phsa
    where = environment()
    return {
        "name": config.run.name,
        "final_val_loss_nats": evaluation.total.nats_per_token,
        "unigram_entropy_nats": baselines.unigram_entropy_nats,
        "bigram_entropy_nats": baselines.bigram_entropy_nats,
        "loss_over_unigram_frac": evaluation.total.nats_per_token / baselines.unigram_entropy_nats,
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
        "frac_queries_with_more_candidates_than_k": evaluation.selection.get(_CHOICE),
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


def _samples(run: Run) -> list[dict[str, str]]:
    """Continues the recipe's prompts. All processes call it: the model may be spread over them."""
    prompts = run.config.run.sample_prompts
    if not prompts:
        return []
    with run.parts.gathered_parameters():
        texts = generate(run.parts.model, run.config, run.groups, run.tokenizer, run.table, prompts)
    samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    for sample in samples:
        run.recorder.event("sample", **sample)
    return samples
