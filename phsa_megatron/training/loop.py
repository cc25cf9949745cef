"""The life of a run, from its first equation to its report. Read this page first.

Who asks a run to leave (`touch RUN/exit`, SIGTERM, SIGUSR1) gets a committed checkpoint and a process that
ends in good order; the same command goes on from there. `touch RUN/save` saves and goes on.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from phsa_megatron.config.goodput import STEP_TIME
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.topk_schedule import changes_over_steps, step_topk
from phsa_megatron.data.batches import Batch
from phsa_megatron.monitoring.alerts import Alert
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training import information
from phsa_megatron.training.alarms import Alarms
from phsa_megatron.training.evaluate import Evaluation
from phsa_megatron.training.finish import finish, write_report_if_asked
from phsa_megatron.training.gpu_scores import gpu_scores
from phsa_megatron.training.norms import norm_metrics
from phsa_megatron.training.profiling import StepProfiler
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.replay import write_replay
from phsa_megatron.training.run import Run, faults_of, open_run, read_ahead
from phsa_megatron.training.state import capture_rng
from phsa_megatron.training.step import NonFiniteStepError, StepResult, train_step


@dataclass(frozen=True)
class Outcome:
    """How a process ended that did not fail."""

    done: bool
    """All steps are trained and summed up; otherwise the run was asked to leave and can go on."""
    step: int
    """Completed optimizer steps, all in a committed checkpoint."""
    reason: str
    """Why it ended, for people."""


def train(config: TrainConfig, groups: Groups, progress: Progress | None = None) -> Outcome:
    """Trains until `run.train_steps`, or until asked to leave.

    Args:
        config: the resolved settings.
        groups: this process's place among all.
        progress: kept up to date, for whoever reports a failure.

    Returns:
        How it ended; equal on all processes.

    Raises:
        PhsaError: it cannot go on; the message says why and what to do.
    """
    progress = progress or Progress(faults=faults_of(config, groups.rank))
    with (
        open_run(config, groups, progress) as run,
        read_ahead(run) as prefetcher,
        profiler_of(run) as profiler,
        ExitStack() as scoring,
    ):
        alarms = Alarms(run)
        scores = scoring.enter_context(gpu_scores(config, alarms.tell))
        run.console.start(run.state.step)
        run.meter.start()
        while run.state.step < config.run.train_steps and not run.asked.exit:
            profiler.before_step(run.state.step + 1)
            run.progress.enter("data", step=run.state.step + 1)
            batches = run.wait_for_batches(prefetcher)
            if batches is None:
                break
            with scores.step():
                result = _step(run, batches, alarms)
            _log(run, batches, result, alarms)
            scores.after_step(run.state.step)
            if _due(run, config.evaluate.every_steps):
                evaluate(run)
            run.poll()
            if run.asked.save or _due(run, config.checkpoint.save_every_steps):
                run.save()
            run.checkpointer.poll()

        run.save(must_succeed=True)
        if run.state.step == config.run.train_steps:
            evaluation = evaluate(run)
            if evaluation is not None:
                finish(run, evaluation)
                return Outcome(True, run.state.step, "all steps are trained")
        return _leave(run)


def profiler_of(run: Run) -> StepProfiler:
    """Returns what traces the steps that the recipe names, on process 0."""
    settings = run.config.monitoring
    return StepProfiler(
        settings.profile,
        run.folder.profile_dir,
        run.progress,
        run.groups.device,
        active=run.groups.rank == 0,
        nvtx=settings.nvtx,
    )


def _step(run: Run, batches: list[Batch], alarms: Alarms) -> StepResult:
    """Makes one step. A step that is not finite leaves a replay file, and unchanged weights."""
    rng = capture_rng()
    recorder = information.recorder_of_step(run.config, run.groups, run.state.step + 1)
    logits = information.logits_of_step(run.config, run.groups, run.state.step + 1)
    try:
        with run.meter.communication.running():
            result = train_step(run.parts, batches, run.table, run.state, run.progress, recorder, logits)
    except NonFiniteStepError as error:
        # Raised on all processes together, so that they can still write a checkpoint together.
        failure = write_replay(run, error, rng)
        alarms.tell(Alert("non_finite", error.step, str(failure), error.evidence()))
        raise failure from error
    if recorder is not None:
        run.recorder.log(run.state.step, information.metrics(recorder, run.groups))
    if logits is not None:
        run.recorder.log(run.state.step, information.logit_metrics(logits, run.groups))
    if _due(run, run.config.monitoring.norms_every_steps):
        run.recorder.log(run.state.step, norm_metrics(run.parts, result.grad_norm))
    alarms.after_step(result, rng)
    return result


def _log(run: Run, batches: list[Batch], result: StepResult, alarms: Alarms) -> None:
    run.progress.step_done()
    step = run.state.step
    run.meter.add(batches, step)
    if step % run.config.monitoring.log_every_steps == 0 or step == run.config.run.train_steps:
        values = run.meter.record(run, result)
        if changes_over_steps(run.config.attention):
            values["attention/topk"] = step_topk(run.config, step).mean
        values |= _goodput(run, values)
        run.recorder.log(step, values)
        run.console.step(step, values)
        alarms.after_record(values)


def _goodput(run: Run, values: dict[str, float]) -> dict[str, float]:
    """Returns the goodput over all launches, on process 0."""
    if run.goodput is None:
        return {}
    run.goodput.add(run.state.step, values[STEP_TIME])
    share = run.goodput.frac(time.time())
    return {} if share is None else {"perf/goodput_frac": share}


def _due(run: Run, every_steps: int) -> bool:
    """Returns whether what happens every so many steps happens now; the last step has its own turn."""
    step = run.state.step
    return every_steps > 0 and step % every_steps == 0 and step < run.config.run.train_steps


def evaluate(run: Run) -> Evaluation | None:
    """Measures and logs the validation loss; returns None if the run was asked to leave meanwhile."""
    run.progress.enter("evaluate")
    run.meter.stop(run.state)

    def should_leave() -> bool:
        run.progress.moved()
        return run.poll().exit

    evaluation = run.evaluator.run(run.parts, should_leave=should_leave)
    run.meter.start()
    if evaluation is not None:
        run.recorder.log(run.state.step, evaluation.metrics())
        for histogram in evaluation.histograms():
            run.recorder.histogram(run.state.step, histogram.name, histogram.shares, histogram.edges)
        losses = "  ".join(
            f"{domain} {loss.nats_per_token:.4f} nats/token {loss.bits_per_byte:.4f} bits/byte"
            for domain, loss in evaluation.domains.items()
        )
        run.notify(
            "evaluation",
            f"validation at step {run.state.step}: {evaluation.total.nats_per_token:.4f} nats/token "
            f"({losses})",
            step=run.state.step,
        )
    return evaluation


def _leave(run: Run) -> Outcome:
    """Ends a run that was asked to leave; its checkpoint is committed already."""
    step, steps = run.state.step, run.config.run.train_steps
    reason = (
        f"asked to leave by {run.asked.reason}: step {step} of {steps} is saved; start the same command "
        "again to go on"
    )
    run.notify("stop_request", reason, step=step)
    run.notify("end", f"left {run.folder.path} at step {step}", reason=reason, step=step)
    write_report_if_asked(run)
    return Outcome(False, step, reason)
