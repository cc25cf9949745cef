"""Tiny random models of transformers in folders, with a tokenizer whose punctuation has a meaning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB_SIZE = 90
EOD = "<|endoftext|>"
TINY_PHSA = [
    "attention.block_tokens=4",
    "attention.init_tokens=4",
    "attention.local_tokens=8",
    "attention.train_topk=2",
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 85 ids, ten of them punctuation."""
    words = [EOD, *".,!?;:()-*", *(f"w{i}" for i in range(74))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=EOD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Callable[..., Path]:
    """Returns a builder of folders with a random model: `model_folder("qwen3", tied=True, dtype=...)`."""
    transformers = pytest.importorskip("transformers", reason="the other implementation to compare with")
    classes = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    built: dict[tuple[str, bool, torch.dtype], Path] = {}

    def build(kind: str, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, tied, dtype) in built:
            return built[kind, tied, dtype]
        config_class, model_class = classes[kind]
        torch.manual_seed(1)
        config = config_class(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            initializer_range=0.2,  # attention far from uniform, so that it matters what is selected
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
        )
        folder = tmp_path_factory.mktemp(kind) / "theirs"
        model = model_class(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:  # all ones would not show norms that change places
                    weight.add_(torch.randn_like(weight) * 0.1)
        model.to(dtype).save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        return built.setdefault((kind, tied, dtype), folder)

    return build
