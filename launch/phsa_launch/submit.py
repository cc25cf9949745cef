"""Turns a checked run into a Slurm job: files in the run folder, then sbatch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from phsa_launch import slurm_commands
from phsa_launch.job_script import job_log, job_name, render
from phsa_megatron.config.code_snapshot import write_code_snapshot
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.prepare_run import Start, prepare_run_folder
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig


@dataclass(frozen=True)
class Submitted:
    """What became of a submission.

    Attributes:
        folder: the run folder.
        job_ids: jobs in the order in which they run; none if the run is finished already.
        messages: lines for the person.
    """

    folder: RunFolder
    job_ids: tuple[str, ...]
    messages: tuple[str, ...]


def submit_run(config: TrainConfig) -> Submitted:
    """Write RUN/config.yaml, RUN/job.sbatch and RUN/code, and submit the job (or the chain of jobs).

    Raises:
        ConfigError: the folder cannot be this run, or a job of this run waits or runs already.
        SlurmError: Slurm refused, in its words.
    """
    folder = RunFolder.of(config)
    refuse_a_second_job(folder)
    script = render(config, Path.cwd())
    prepared = prepare_run_folder(config)
    if prepared.start is Start.finished:
        return Submitted(folder, (), prepared.messages)
    code = write_code_snapshot(folder.code_dir)
    write_atomically(folder.job_script, script)
    folder.logs_dir.mkdir(exist_ok=True)
    job_ids, said = submit_script(folder, config.cluster.chain)
    files = f"wrote {folder.config_file}, {folder.job_script} and {folder.code_dir} ({code})"
    return Submitted(folder, job_ids, (*prepared.messages, files, *said))


def submit_script(folder: RunFolder, num_jobs: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Submit the batch script of a run folder, and return the jobs' numbers and lines for the person.

    What an earlier job left to stop this one (failures counted, given up) is removed; bad nodes stay bad.
    """
    for name in (folder.gave_up, folder.failures_file):
        name.unlink(missing_ok=True)
    messages, options = [], []
    bad = bad_nodes(folder)
    if bad:
        options.append(f"--exclude={','.join(bad)}")
        messages.append(
            f"without {', '.join(bad)}, found bad earlier; to use them again remove {folder.bad_nodes}"
        )
    job_ids: list[str] = []
    for _ in range(num_jobs):
        job_ids.append(slurm_commands.submit(folder.job_script, options))
        with folder.job_ids_file.open("a", encoding="utf-8") as stream:
            stream.write(job_ids[-1] + "\n")
    then = f", then {', '.join(job_ids[1:])} one after another" if num_jobs > 1 else ""
    messages.append(f"submitted job {job_ids[0]}{then}; console: {job_log(folder, job_ids[0])}")
    messages.append(f"watch it with: phsa-launch status {folder.path}")
    return tuple(job_ids), tuple(messages)


def check_with_slurm(config: TrainConfig) -> str:
    """Have Slurm check the batch script, writing nothing into the run folder; return what it says."""
    with tempfile.TemporaryDirectory(prefix="phsa-launch-") as folder:
        script = Path(folder) / "job.sbatch"
        script.write_text(render(config, Path.cwd()), encoding="utf-8")
        return slurm_commands.test_only(script)


def refuse_a_second_job(folder: RunFolder) -> None:
    """Stop if a job of this run waits or runs.

    Raises:
        ConfigError: naming it and what to do.
    """
    live = [job for job in slurm_commands.jobs_named(job_name(folder)) if not job.is_over]
    if live:
        raise ConfigError(
            f"{folder.path} has job {live[0].job_id} already ({live[0].state}). Let it run, or end it first: "
            f"phsa-launch stop {folder.path}"
        )


def bad_nodes(folder: RunFolder) -> list[str]:
    """Return the nodes that a preflight found bad."""
    if not folder.bad_nodes.is_file():
        return []
    lines = folder.bad_nodes.read_text(encoding="utf-8").splitlines()
    return sorted({line.split("\t")[0] for line in lines if line.strip()})
