"""The names in a run folder, spelt here and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import TrainConfig

_STEP_FOLDER = re.compile(r"step_(\d+)")
# A save that was interrupted before its commit, or a removal that was: never a checkpoint.
_LEFTOVER = re.compile(r"step_\d+\.(partial|pruned)|\..*\.tmp")


class RunFolder:
    """Names in `RUN/`; nobody else spells them.

    Args:
        path: the folder, whether or not it exists.
    """

    COMMIT_MARKER = "COMMITTED.json"
    """File that makes `checkpoints/step_########` a committed checkpoint."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.save_request = self.path / "save"
        self.exit_request = self.path / "exit"
        self.done = self.path / "done"
        self.committed_step = self.path / "committed_step"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.report_file = self.path / "report.html"
        self.lineage_file = self.path / "lineage.json"
        self.checkpoints_dir = self.path / "checkpoints"
        self.logs_dir = self.path / "logs"
        self.wandb_dir = self.path / "wandb"
        self.tensorboard_dir = self.path / "tensorboard"
        self.profile_dir = self.path / "profile"
        self.replay_dir = self.path / "replay"
        self.alerts_dir = self.path / "alerts"
        self.heartbeats_dir = self.path / "heartbeats"
        self.preflight_dir = self.path / "preflight"
        self.bad_nodes = self.path / "bad_nodes"
        self.faults_file = self.path / "faults.jsonl"
        # Of a Slurm job; the batch script spells the same names.
        self.job_script = self.path / "job.sbatch"
        self.code_dir = self.path / "code"
        self.job_ids_file = self.path / "job_ids"
        self.restarts_file = self.path / "restarts.jsonl"
        self.attempt_file = self.path / "attempt"
        self.failures_file = self.path / "failures_without_progress"
        self.gave_up = self.path / "gave_up"

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        """Return the folder of a run: `root_dir/name`, always the same."""
        return cls(Path(config.run.root_dir) / config.run.name)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def existing_config(self) -> Path:
        """Return the file of the run's settings.

        Raises:
            ConfigError: there is none, so that the folder is no run's.
        """
        if not self.config_file.is_file():
            raise ConfigError(f"{self.path} is no run folder: it has no {self.config_file.name}")
        return self.config_file

    def committed_steps(self) -> list[int]:
        """Return the steps of checkpoints with a commit marker, ascending; contents are not verified."""
        if not self.checkpoints_dir.is_dir():
            return []
        found = ((entry, _STEP_FOLDER.fullmatch(entry.name)) for entry in self.checkpoints_dir.iterdir())
        return sorted(int(m.group(1)) for entry, m in found if m and (entry / self.COMMIT_MARKER).is_file())

    def unexplained_entries(self) -> list[str]:
        """Return what lies in `checkpoints/`, neither committed nor a leftover of an interrupted save."""
        if not self.checkpoints_dir.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self.checkpoints_dir.iterdir()
            if not _LEFTOVER.fullmatch(entry.name) and not (entry / self.COMMIT_MARKER).is_file()
        )
