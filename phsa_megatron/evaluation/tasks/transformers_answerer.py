"""A transformers model folder as an answerer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.answerer import Request, Scored, TokenAnswerer, scored

_ROWS_OF_LOGITS = 512


class TransformersAnswerer(TokenAnswerer):
    """Any causal language model that transformers loads from a folder; nothing is fetched."""

    tokens_at_once = 64

    def __init__(
        self,
        folder: Path,
        *,
        attention: str = "sdpa",
        max_tokens: int | None = None,
        device: str | None = None,
    ) -> None:
        """Load a model and its tokenizer.

        Args:
            folder: config.json, weights and tokenizer files.
            attention: the name of an attention that transformers knows.
            max_tokens: most tokens of a text; None is what the folder's config.json says.
            device: None is the first GPU, or the CPU if there is none.

        Raises:
            ConfigError: the folder lacks a file, or its tokenizer has no end of text.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a transformers folder: it has no config.json")
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation=attention, dtype="auto"
        )
        self._model = model.to(self._device).eval()
        end = self._tokenizer.eos_token_id
        if end is None:
            end = self._model.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        if end is None:
            raise ConfigError(f"{folder}: neither the tokenizer nor config.json has an eos_token_id")
        self.eod_id: int = end
        self.name = f"{folder.name}, {attention}"
        self.max_tokens = max_tokens or self._model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        text: Any = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return str(text)

    @torch.no_grad()
    def continued(self, ids: list[int], num_tokens: int) -> list[int]:
        """Return at most `num_tokens` most likely tokens after `ids`."""
        prompt = torch.tensor([ids], device=self._device)
        whole = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=self.eod_id,
            pad_token_id=self.eod_id,
        )
        new: list[int] = whole[0, len(ids) :].tolist()
        return new

    @torch.no_grad()
    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Return the scores of the tokens `first ..` of each document, one document at a time.

        Raises:
            ConfigError: a document is longer than `max_tokens`.
        """
        found = []
        for ids, first in requests:
            self.check_length(len(ids))
            tokens = torch.tensor([ids], device=self._device)
            kept = len(ids) - first + 1
            logits = self._model(tokens, logits_to_keep=kept, use_cache=False).logits[0, :-1]
            targets = torch.split(tokens[0, first:], _ROWS_OF_LOGITS)
            parts = torch.split(logits, _ROWS_OF_LOGITS)
            found.append(scored(zip(parts, targets, strict=True)))
        return found
