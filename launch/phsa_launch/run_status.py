"""Prints what a run is doing, from its folder and, for a job, from Slurm."""

from __future__ import annotations

import time
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from phsa_launch import slurm_commands
from phsa_launch.job_script import job_name
from phsa_launch.run_progress import (
    Attempt,
    Heartbeat,
    Progress,
    attempt_start_unix_s,
    read_attempts,
    read_heartbeats,
    read_progress,
)
from phsa_megatron.config.derive import world_size
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Scheduler, TrainConfig

_SHOWN_ATTEMPTS = 20
_QUIET_AFTER_S = 60.0


def print_status(folder: RunFolder, config: TrainConfig, console: Console) -> None:
    """Print one run: a table of facts, then its attempts with their causes."""
    progress, attempts = read_progress(folder), read_attempts(folder)
    job, state = _state(folder, config)
    is_running = job is not None and job.state == "RUNNING"
    facts = Table(show_header=False, title=str(folder.path), title_justify="left")
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in (
        ("state", state),
        ("step", _steps(folder, config, progress)),
        ("time left", _time_left(config, progress, folder)),
        ("goodput", _goodput(folder, progress, attempts, is_running)),
        ("restarts", _restarts(attempts)),
        ("ranks", _ranks(folder, config) if is_running else ""),
    ):
        if text:
            facts.add_row(name, Text(text))
    console.print(facts)
    if attempts:
        console.print(_attempts_table(attempts))


def words_for_seconds(seconds: float) -> str:
    """Return a duration for people: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for unit_s, unit, smaller_s, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit_s:
            rest = whole % unit_s // smaller_s
            return f"{whole // unit_s} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def _state(folder: RunFolder, config: TrainConfig) -> tuple[slurm_commands.Job | None, str]:
    ends = None
    if folder.done.exists():
        ends = "done"
    elif folder.gave_up.exists():
        ends = folder.gave_up.read_text(encoding="utf-8").strip()
    if config.cluster.scheduler is Scheduler.local:
        return None, ends or "started on one host, so only its last record tells whether it runs"
    try:
        jobs = slurm_commands.jobs_named(job_name(folder))
    except slurm_commands.SlurmError as error:
        return None, ends or f"unknown: {error}"
    live = [job for job in jobs if not job.is_over]
    # The first job is the one at work; the others of a chain wait for it.
    if live:
        job = live[0]
        where = f" on {job.nodes} for {job.elapsed}" if job.nodes else f": {job.reason}"
        then = f"; then {', '.join(later.job_id for later in live[1:])}" if len(live) > 1 else ""
        return job, (f"{ends}; " if ends else "") + f"job {job.job_id} {job.state}{where}{then}"
    if ends:
        return None, ends
    if jobs:
        return (
            None,
            f"no job waits or runs; job {jobs[-1].job_id} ended {jobs[-1].state} ({jobs[-1].reason})",
        )
    return None, f"no job waits or runs. To go on: phsa-launch requeue {folder.path}"


def _steps(folder: RunFolder, config: TrainConfig, progress: Progress) -> str:
    committed = folder.committed_steps()
    saved = f"; step {committed[-1]} is committed" if committed else "; nothing is committed yet"
    seen = ""
    if progress.last_record_unix_s is not None:
        seen = f"; last record {words_for_seconds(time.time() - progress.last_record_unix_s)} ago"
    return f"{progress.logged_step} of {config.run.train_steps}{saved}{seen}"


def _time_left(config: TrainConfig, progress: Progress, folder: RunFolder) -> str:
    if progress.step_time_s is None or folder.done.exists():
        return ""
    left_s = (config.run.train_steps - progress.logged_step) * progress.step_time_s
    return f"{words_for_seconds(left_s)} of training at {progress.step_time_s:.3g} s a step, without stops"


def _goodput(folder: RunFolder, progress: Progress, attempts: list[Attempt], is_running: bool) -> str:
    """Return the share of time in steps that count: of the time on nodes, and of all time since the start."""
    goodput = progress.goodput
    if goodput is None or progress.last_record_unix_s is None:
        return ""
    on_nodes_s = sum(float(attempt.end_unix_s - attempt.start_unix_s) for attempt in attempts)
    end_unix_s = float(attempts[-1].end_unix_s) if attempts else progress.last_record_unix_s
    started = attempt_start_unix_s(folder)
    if is_running and started is not None:
        end_unix_s = time.time()
        on_nodes_s += end_unix_s - started
    elif not attempts:
        on_nodes_s = progress.last_record_unix_s - goodput.first_start_unix_s
    share, of_all = goodput.share_of(on_nodes_s), goodput.frac(end_unix_s)
    if share is None:
        return ""
    text = f"{share:.1%} of {words_for_seconds(on_nodes_s)} at work went into steps that count"
    if attempts and of_all is not None:
        whole_s = end_unix_s - goodput.first_start_unix_s
        text += f" ({of_all:.1%} of {words_for_seconds(whole_s)} since the first launch)"
    if progress.num_superseded_steps:
        text += f"; {progress.num_superseded_steps} steps were run twice"
    return text


def _restarts(attempts: list[Attempt]) -> str:
    causes = [attempt.cause for attempt in attempts if attempt.cause != "done"]
    if not causes:
        return ""
    counts = {cause: causes.count(cause) for cause in dict.fromkeys(causes)}
    return f"{len(causes)}: " + ", ".join(f"{count} x {cause}" for cause, count in counts.items())


def _ranks(folder: RunFolder, config: TrainConfig) -> str:
    beats = read_heartbeats(folder.heartbeats_dir)
    if not beats:
        return ""
    expected = world_size(config)
    quiet = [beat for beat in beats if beat.age_s > _QUIET_AFTER_S]
    missing = sorted(set(range(expected)) - {beat.rank for beat in beats})
    text = f"{len(beats) - len(quiet)} of {expected} gave a sign of life within {_QUIET_AFTER_S:.0f} s"
    if quiet:
        text += f"; quiet: {', '.join(_beat(beat) for beat in quiet[:5])}"
    if missing:
        text += f"; never seen: {', '.join(map(str, missing[:20]))}"
    slowest = min(beats, key=lambda beat: beat.step)
    return f"{text}; furthest behind: {_beat(slowest)}"


def _beat(beat: Heartbeat) -> str:
    where = f"step {beat.step}, {beat.phase}, {words_for_seconds(beat.age_s)} ago"
    return f"rank {beat.rank} on {beat.host} ({where})"


def _attempts_table(attempts: list[Attempt]) -> Table:
    shown = attempts[-_SHOWN_ATTEMPTS:]
    hidden = len(attempts) - len(shown)
    table = Table(title="attempts" + (f" (the last {len(shown)})" if hidden else ""), title_justify="left")
    for name in ("job", "nodes", "began", "took", "steps", "cause"):
        table.add_column(name, overflow="fold")
    for attempt in shown:
        code = f", exit code {attempt.exit_code}" if attempt.exit_code else ""
        detail = f", {attempt.detail}" if attempt.detail else ""
        table.add_row(
            str(attempt.job_id),
            Text(attempt.nodes),
            datetime.fromtimestamp(attempt.start_unix_s).isoformat(" "),
            words_for_seconds(attempt.end_unix_s - attempt.start_unix_s),
            f"{attempt.start_step} to {attempt.end_step}",
            Text(f"{attempt.cause}{code}{detail}"),
        )
    return table
