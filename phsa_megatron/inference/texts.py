"""Texts in, texts out: prompts from files, completions as JSON lines, and one at a time as they grow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.inference.generator import Completion, Generator
from phsa_megatron.inference.sampling import Sampling

# What incomplete UTF-8 decodes to: the rest of a character may still come.
_INCOMPLETE = "\ufffd"


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of prompts.

    Args:
        path: `.jsonl` has one object a line with the text under "prompt", other keys are kept; any other
            file has one prompt a line.

    Raises:
        DataError: the file cannot be read, has no prompt, or a line is not such an object; it names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--input={path} cannot be read: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            records.append({"prompt": line})
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"--input={path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise DataError(f'--input={path}, line {number}: needs an object with a text under "prompt"')
        records.append(record)
    if not records:
        raise DataError(f"--input={path} holds no prompt")
    return records


@dataclass(frozen=True)
class TextGenerator:
    """Continues texts.

    Attributes:
        generator: of tokens.
        tokenizer: the model's.
        sampling: how tokens are chosen.
    """

    generator: Generator
    tokenizer: Tokenizer
    sampling: Sampling

    def complete(
        self, records: Sequence[dict[str, Any]], batch_size: int, after_batch: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        """Yield each record with what follows its prompt, in order, a batch at a time.

        Added keys: completion (text), num_prompt_tokens, num_tokens, finish_reason.

        Args:
            records: with the text under "prompt".
            batch_size: prompts that are generated together.
            after_batch: told how many tokens a finished batch has generated.
        """
        for first in range(0, len(records), batch_size):
            batch = records[first : first + batch_size]
            prompts = [self._ids(record["prompt"]) for record in batch]
            done = self.generator.generate(prompts, self.sampling, first_number=first)
            after_batch(sum(len(completion.tokens) for completion in done))
            for record, prompt, completion in zip(batch, prompts, done, strict=True):
                yield record | {
                    "completion": self._text(completion.tokens),
                    "num_prompt_tokens": len(prompt),
                    "num_tokens": len(completion.tokens),
                    "finish_reason": completion.finish_reason,
                }

    def stream(self, prompt: str, show: Callable[[str], None], number: int = 0) -> Completion:
        """Return what follows a text; `show` gets its pieces as soon as their characters are complete."""
        tokens: list[int] = []
        shown = 0

        def on_token(_: int, token: int) -> None:
            nonlocal shown
            tokens.append(token)
            text = self._text(tokens)
            if not text.endswith(_INCOMPLETE):
                show(text[shown:])
                shown = len(text)

        done = self.generator.generate(
            [self._ids(prompt)], self.sampling, first_number=number, on_token=on_token
        )[0]
        show(self._text(tokens)[shown:])
        return done

    def _ids(self, text: str) -> list[int]:
        # Nothing before the first token: the end of the document before stands for it.
        return self.tokenizer.encode(text) or [self.tokenizer.eod_id]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode([token for token in tokens if token != self.tokenizer.eod_id])
