"""Where a stage's first weights came from: one file in the run folder, with the whole chain of stages."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder


@dataclass(frozen=True)
class Source:
    """A folder whose weights start a run.

    Attributes:
        path: absolute path.
        kind: 'run' for a run folder, 'huggingface' for a folder with config.json and safetensors.
        step: the newest committed step of a run folder, else None.
        config_file: the resolved settings of a run folder, else None.
        config_sha256: hash of the settings that describe the weights.
        ancestors: the lineage of the source itself, oldest last.
    """

    path: Path
    kind: str
    step: int | None
    config_file: Path | None
    config_sha256: str
    ancestors: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.path}" + (f", step {self.step}" if self.step is not None else " (Hugging Face)")


def describe_source(init_from: str) -> Source:
    """Return what `run.init_from` names.

    Raises:
        ConfigError: it is neither a run folder with a committed checkpoint nor a Hugging Face folder.
    """
    path = Path(init_from).expanduser().resolve()
    folder = RunFolder(path)
    if folder.config_file.is_file():
        steps = folder.committed_steps()
        if not steps:
            raise ConfigError(
                f"run.init_from={init_from}: this run has no committed checkpoint; let it save one first "
                f"(touch {folder.save_request} while it runs)"
            )
        return Source(
            path,
            "run",
            steps[-1],
            folder.config_file,
            _sha256(folder.config_file),
            read_lineage(folder.lineage_file),
        )
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Source(path, "huggingface", None, None, _sha256(path / "config.json"))
    raise ConfigError(
        f"run.init_from={init_from}: {path} is neither a run folder (config.yaml and checkpoints/) nor a "
        "Hugging Face folder (config.json and *.safetensors); check the path"
    )


def write_lineage(path: Path, source: Source) -> None:
    """Write the chain of stages of a new run: its source first, the oldest ancestor last."""
    entry = {
        "init_from": str(source.path),
        "kind": source.kind,
        "step": source.step,
        "config_sha256": source.config_sha256,
    }
    write_atomically(path, json.dumps([entry, *source.ancestors], indent=2) + "\n")


def read_lineage(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the chain of stages of a run, nothing if it started from scratch.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return ()
    try:
        chain = json.loads(path.read_text(encoding="utf-8"))
        return tuple(dict(entry) for entry in chain)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}; restore it or remove it") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
