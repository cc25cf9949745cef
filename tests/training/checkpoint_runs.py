"""Tiny runs for the tests of checkpoints: steps that show every lost bit, scripts to be killed."""

import hashlib
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import torch

from phsa_megatron.config import compose
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionKind, Dtype, Selector, SourceConfig, TrainConfig
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.commit import FORMAT_VERSION
from phsa_megatron.training.optimizer import build_parts, set_hyperparameters
from phsa_megatron.training.state import TrainState, capture_rng, rng_digest
from tests import forks

# Everything below the guard: megatron's save starts a process that imports the main script.
SCRIPT_PROLOGUE = """
import sys
if __name__ == "__main__":
    sys.path[:0] = [{root_tests!r}, {tests!r}]
    import conftest
    from pathlib import Path
    import checkpoint_runs as t
"""


def tiny_config(root: Path, **sections) -> TrainConfig:
    """A model of some thousand weights; `sections` are changes as `section={key: value}`."""
    config = TrainConfig()
    values = {
        "run": {"name": "tiny", "root_dir": str(root), "train_steps": 40, "dtype": Dtype.fp32},
        "model": {
            "name": "tiny", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_query_heads": 4,
            "num_kv_heads": 2, "head_dim": 8, "vocab_size": 120, "vocab_pad_multiple": 16,
        },
        "attention": {"kind": AttentionKind.dense},
        "data": {
            "name": "none", "seq_len_tokens": 32, "tokenizer_file": "none.json",
            "sources": {"a": SourceConfig(weight=1.0, domain="a", train_prefix="a")},
        },
        "optim": {
            "global_batch_sequences": 2, "micro_batch_sequences": 1, "lr": 1e-2, "warmup_steps": 4,
            "decay_steps": 8,
        },
        "checkpoint": {"save_every_steps": 1, "keep_last": 3},
        "cluster": {"name": "test"},
    }  # fmt: skip
    for section in (values, sections):
        for name, changes in section.items():
            for key, value in changes.items():
                setattr(getattr(config, name), key, value)
    return config


def use_nsa(config: TrainConfig) -> None:
    """Give every layer NSA's weights."""
    attention = config.attention
    attention.kind, attention.selector = AttentionKind.phsa, Selector.nsa
    attention.mean_weight_frac, attention.nsa_window_tokens = 1.0, 8


def train(parts, state: TrainState, num_steps: int) -> list[float]:
    """Steps whose gradients come from torch's global generator: right only if that is restored too."""
    norms = []
    for _ in range(num_steps):
        parts.zero_grad()
        for _, parameter in parts.named_parameters():
            parameter.main_grad.copy_(
                torch.randn(parameter.shape) + float(np.random.rand()) + random.random()
            )
        for chunk in parts.model:
            chunk.start_grad_sync()
            chunk.finish_grad_sync()
        set_hyperparameters(parts, state.consumed_sequences + 2)
        _, norm, _ = parts.optimizer.step()
        norms.append(float(norm))
        state.step += 1
        state.consumed_sequences += 2
    return norms


def fingerprint(parts) -> dict[str, bytes]:
    """All bytes that a resume has to bring back: weights, moments, step counters, generators."""
    content = {f"weight {name}": as_bytes(value) for name, value in parts.named_parameters()}
    for part in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        for group, values in enumerate(part.optimizer.param_groups):
            content[f"step {group}"] = repr(values.get("step")).encode()
            for i, parameter in enumerate(values["params"]):
                content[f"main {group}.{i}"] = as_bytes(parameter)
                for key, value in part.optimizer.state.get(parameter, {}).items():
                    content[f"{key} {group}.{i}"] = as_bytes(value)
    content["scheduler"] = repr(sorted(parts.scheduler.state_dict().items())).encode()
    content["rng"] = rng_digest(capture_rng()).encode()
    return content


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class Events(list):
    """Collects what a Checkpointer tells."""

    def __call__(self, kind, text, **fields):
        self.append((kind, text))

    def kinds(self):
        return [kind for kind, _ in self]

    def text(self, kind):
        return "\n".join(text for found, text in self if found == kind)


class Run:
    """One process's run: groups, parts, checkpointer. Closed groups make room for the next."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = RunFolder.of(config)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.config_file.write_text(compose.dump(config))
        self.groups = initialize(config)
        self.parts = build_parts(config, self.groups)
        self.events = Events()
        self.checkpointer = Checkpointer(self.folder, config, self.groups, self.events)
        self.state = TrainState()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.groups.close()

    def train(self, num_steps):
        return train(self.parts, self.state, num_steps)

    def save(self, **options):
        return self.checkpointer.save(self.parts, self.state, **options)

    def load(self, **options):
        self.state = self.checkpointer.load_latest(self.parts, **options)
        return self.state


def write_script(tmp_path, script, **values):
    tests = Path(__file__).parent
    path = tmp_path / "script.py"
    path.write_text(
        script.format(tests=str(tests), root_tests=str(tests.parent), root=str(tmp_path / "runs"), **values)
    )
    return path


def run_script(tmp_path, script, **values) -> str:
    code, out, err = forks.run(write_script(tmp_path, script, **values))
    assert code == 0, out + err
    return out


def run_script_in_ranks(path: Path, processes: int) -> None:
    """Run a script that prints `done` in every rank."""
    ended = forks.run_ranks(processes, path)
    assert [(code, out.count("done")) for code, out, _ in ended] == [(0, 1)] * processes, ended


def format_config(root: Path) -> TrainConfig:
    """The run of the kept checkpoint: as small as can be."""
    return tiny_config(
        root,
        run={"name": "format", "dtype": Dtype.bf16},
        model={"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "num_query_heads": 2,
               "num_kv_heads": 1, "vocab_size": 32, "head_dim": 8},
    )  # fmt: skip


def hashes(parts) -> dict[str, str]:
    """Hashes of what a resume brings back, but the generators, whose classes belong to other libraries."""
    return {
        key: hashlib.sha256(value).hexdigest() for key, value in fingerprint(parts).items() if key != "rng"
    }


def write_kept_checkpoint(folder: Path, root: Path) -> None:
    """Write `format_N.tar.gz` and `.json` for a new format version; run with the oldest megatron-core."""
    with Run(format_config(root)) as run:
        run.train(2)
        run.save()
        name = folder / f"format_{FORMAT_VERSION}"
        name.with_suffix(".json").write_text(json.dumps(hashes(run.parts), indent=1) + "\n")
        with tarfile.open(name.with_suffix(".tar.gz"), "w:gz") as archive:
            archive.add(run.folder.checkpoints_dir / "step_00000002", "step_00000002")
