"""A small tokenizer, a run folder with a checkpoint, and answerers that know or do not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer as Backend

from phsa_megatron.config import compose
from phsa_megatron.config.resolved import to_config
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.data.bpe import train_bpe
from phsa_megatron.evaluation.tasks.answerer import LogLikelihood, Request, Scored
from phsa_megatron.evaluation.tasks.words import ADJECTIVES, NOUNS
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.state import TrainState

EOD = "<|endoftext|>"
VOCAB_SIZE = 500
TINY = {
    "run": {"train_steps": 8, "dtype": "fp32", "num_threads": 1},
    "model": {
        "name": "tiny",
        "num_layers": 2,
        "hidden_size": 48,
        "ffn_hidden_size": 64,
        "num_query_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB_SIZE,
        "vocab_pad_multiple": 16,
    },
    "attention": {"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, "train_topk": 2},
    "data": {"name": "tiny", "sources": {}},
    "optim": {
        "global_batch_sequences": 1,
        "micro_batch_sequences": 1,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup_steps": 1,
        "decay_steps": 1,
    },
    "cluster": {"name": "test", "device": "cpu"},
}


class Scripted:
    """Answers by a function of the prompt; tokens are those of a tokenizer."""

    name, eod_id = "scripted", 0

    def __init__(self, backend: Backend, answer: Callable[[str], str], max_tokens: int = 10**6) -> None:
        self._backend, self._answer, self.max_tokens = backend, answer, max_tokens
        self.prompts: list[str] = []

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        self.prompts += prompts
        return [self._answer(prompt) for prompt in prompts]

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        raise NotImplementedError

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Each token's log-probability is minus its position."""
        return [
            Scored(-torch.arange(r.first, len(r.ids)).float(), torch.zeros(len(r.ids) - r.first).bool())
            for r in requests
        ]


@pytest.fixture(scope="session")
def backend() -> Backend:
    """A byte-level BPE."""
    texts = [f"the {adjective} {noun} so and" for adjective in ADJECTIVES for noun in NOUNS[::20]]
    return train_bpe(texts, VOCAB_SIZE)


@pytest.fixture(scope="session")
def tokenizer_file(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def scripted(backend: Backend) -> Callable[..., Scripted]:
    """Returns a builder: `scripted(lambda prompt: answer)`."""
    return lambda answer, **kwargs: Scripted(backend, answer, **kwargs)


@pytest.fixture(scope="session")
def make_run(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns a function that writes a run folder with a checkpoint of random weights."""
    root = tmp_path_factory.mktemp("runs")

    def make(name: str = "run", *, seq_len: int = 512, mtp: int = 0, **attention: object) -> Path:
        if (root / name).exists():
            return root / name
        own = {
            "run": {"name": name, "root_dir": str(root)},
            "model": {"mtp_num_layers": mtp},
            "data": {"tokenizer_file": str(tokenizer_file), "eod_token": EOD, "seq_len_tokens": seq_len},
            "attention": attention,
        }
        config = to_config(OmegaConf.merge(OmegaConf.structured(TrainConfig), TINY, own))
        folder = RunFolder.of(config)
        folder.path.mkdir(parents=True)
        folder.config_file.write_text(compose.dump(config), encoding="utf-8")
        groups = initialize(config)
        try:
            parts = build_parts(config, groups)
            with torch.no_grad():
                for parameter in parts.modules[0].parameters():
                    parameter.mul_(3.0)  # at the start a model says nearly the same everywhere
            state = TrainState(step=7)
            Checkpointer(folder, config, groups).save_to(
                folder.checkpoints_dir / "step_00000007", parts, state
            )
        finally:
            groups.close()
        return folder.path

    return make
