"""What every task asks of a model: continue a prompt, and say how likely a continuation is.

`Answerer` is all that a task knows. `TokenAnswerer` turns its questions about text into two questions about
tokens, which a checkpoint of this project and a transformers folder answer each in their way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from phsa_megatron.config.errors import ConfigError


class LogLikelihood(NamedTuple):
    """How likely a continuation is after its context."""

    nats: float
    """Sum of the tokens' log-probabilities, natural logarithm."""
    num_tokens: int
    """Tokens of the continuation."""
    is_greedy: bool
    """Whether each token is the most likely one after those before it."""


class Scored(NamedTuple):
    """Tokens of a text, from some position on, as the model sees them; on the CPU."""

    logprobs: Tensor
    """fp32 [n], nats: of each token after all tokens before it."""
    is_greedy: Tensor
    """bool [n]: whether no other token is more likely."""


def scored(parts: Iterable[tuple[Tensor, Tensor]]) -> Scored:
    """Return the scores of tokens, part by part: logits of many positions need not be in memory together.

    Args:
        parts: (logits [n, vocabulary], the tokens that come next int64 [n]) of successive positions.
    """
    logprobs, greedy = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for logits, targets in parts:
        rows = logits.float()
        chosen = rows.gather(1, targets.unsqueeze(1))[:, 0]
        logprobs.append((chosen - rows.logsumexp(1)).cpu())
        greedy.append((chosen == rows.max(1).values).cpu())
    return Scored(torch.cat(logprobs), torch.cat(greedy))


class Request(NamedTuple):
    """A document whose tokens from `first` on are to be scored; what is before them is context."""

    ids: Sequence[int]
    first: int


class Answerer(Protocol):
    """A model behind its tokenizer."""

    name: str
    """For tables and files; differs between any two that one evaluation asks."""
    max_tokens: int
    """Most tokens of a prompt and its answer together."""
    eod_id: int
    """Token that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return the most likely continuation of each prompt, up to the first of `stop` (left out)."""
        ...

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """Return how likely a continuation is; an empty context is the start of a document."""
        ...

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Return the scores of the tokens `first ..` of each document."""
        ...


class TokenAnswerer(ABC):
    """Text in terms of tokens.

    Attributes:
        name: for tables and files.
        max_tokens: most tokens of a prompt and its answer together.
        eod_id: ends a document; generation stops after it, and an empty context is this token.
        tokens_at_once: generated before stop strings are looked for.
    """

    name: str
    max_tokens: int
    eod_id: int
    tokens_at_once: int = 8

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Return the scores of the tokens `first ..` of each document; `first` is at least 1."""

    @abstractmethod
    def continued(self, ids: list[int], num_tokens: int) -> list[int]:
        """Return at most `num_tokens` most likely tokens after `ids`; the end of a document is the last."""

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return the most likely continuation of each prompt, up to the first of `stop` (left out).

        Raises:
            ConfigError: a prompt and its answer are longer than the model's `max_tokens`.
        """
        return [self._generate(self.encode(prompt), max_new_tokens, stop) for prompt in prompts]

    def _generate(self, ids: list[int], max_new_tokens: int, stop: Sequence[str]) -> str:
        ids = ids or [self.eod_id]
        self.check_length(len(ids) + max_new_tokens)
        new: list[int] = []
        text = ""
        while len(new) < max_new_tokens:
            new += self.continued(ids + new, min(self.tokens_at_once, max_new_tokens - len(new)))
            ended = new[-1] == self.eod_id
            text = self.decode(new[:-1] if ended else new)
            cuts = [text.find(end) for end in stop if end in text]
            if cuts:
                return text[: min(cuts)]
            if ended:
                break
        return text

    def loglikelihood(self, context: str, continuation: str) -> LogLikelihood:
        """Return how likely a continuation is; an empty context is the start of a document.

        White space at the end of the context counts as the start of the continuation, which is how a
        tokenizer sees it.

        Raises:
            ConfigError: both together are longer than the model's `max_tokens`.
        """
        stripped = context.rstrip()
        ids, whole = self.encode(stripped), self.encode(context + continuation)
        if not ids:
            ids, whole = [self.eod_id], [self.eod_id, *whole]
        self.check_length(len(whole))
        if len(whole) <= len(ids):
            return LogLikelihood(0.0, 0, True)
        logprobs, is_greedy = self.score([Request(whole, len(ids))])[0]
        return LogLikelihood(float(logprobs.double().sum()), len(logprobs), bool(is_greedy.all()))

    def check_length(self, num_tokens: int) -> None:
        """Refuse a text that is longer than the model was made for.

        Raises:
            ConfigError: it is.
        """
        if num_tokens > self.max_tokens:
            raise ConfigError(
                f"{self.name}: a prompt with its answer has {num_tokens:,} tokens, and this model takes "
                f"{self.max_tokens:,}; ask for shorter texts, or go beyond with max_tokens={num_tokens}"
            )
