"""Asks Slurm, through the commands that every version has, and answers in messages for people."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from phsa_megatron.config.errors import PhsaError


class SlurmError(PhsaError):
    """Slurm is not here, does not answer, or refused."""


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it now.

    Attributes:
        job_id: its number.
        state: PENDING, RUNNING, COMPLETED, ...
        reason: why it waits or how it ended, in Slurm's words.
        nodes: the nodes it runs on.
        elapsed: time in this attempt, as Slurm writes it.
    """

    job_id: str
    state: str
    reason: str
    nodes: str
    elapsed: str

    @property
    def is_over(self) -> bool:
        """Whether it can no longer run."""
        return self.state not in _LIVE


_LIVE = (
    *("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "RESV_DEL_HOLD"),
)


def submit(script: Path, options: list[str]) -> str:
    """Submit a batch script and return the job's number."""
    return _run("sbatch", "--parsable", *options, str(script)).strip().split(";")[0]


def test_only(script: Path) -> str:
    """Have Slurm check a batch script, and return what it says about when the job could start."""
    return _run("sbatch", "--test-only", str(script), with_stderr=True).strip()


def jobs_named(name: str) -> list[Job]:
    """Return all jobs of a name that Slurm still remembers, oldest first."""
    out = _run("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i|%T|%r|%N|%M")
    jobs = [Job(*line.split("|")) for line in out.splitlines() if line.count("|") == 4]
    return sorted(jobs, key=lambda job: int(job.job_id.split("_")[0]))


def cancel(job_ids: list[str]) -> None:
    """Cancel jobs."""
    _run("scancel", *job_ids)


def _run(*command: str, with_stderr: bool = False) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise SlurmError(
            f"{command[0]} is not here: start phsa-launch on a login node of the cluster, add --dry-run to "
            "see the batch script, or choose cluster=local_cpu or cluster=local_gpu for this host"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within 120 s: is slurmctld up?") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command)}\n{said}")
    return done.stdout + done.stderr if with_stderr else done.stdout
