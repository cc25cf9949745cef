"""A checkpoint of a run as an answerer: one process, any selector and any k on the same weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phsa_megatron.attention.kv_cache import why_not_cached
from phsa_megatron.attention.punctuation import table_of
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config import compose
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.keys import did_you_mean
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, KernelImpl, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import inference_topk, selects_blocks
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.evaluation.information_loss import attending, swapped
from phsa_megatron.evaluation.tasks.answerer import Request, Scored, TokenAnswerer, scored
from phsa_megatron.inference.generate import generate
from phsa_megatron.inference.generator import Generator
from phsa_megatron.inference.sampling import Sampling
from phsa_megatron.parallel.groups import Groups, initialize
from phsa_megatron.training.commit import read_marker
from phsa_megatron.training.replay import single_process
from phsa_megatron.training.weights import find_checkpoint, load_model

OWN, DENSE = "own", "dense"
"""Names for `selector`: what the run was trained with, and full causal attention."""
_LENGTH_MULTIPLE = 64
_TOKENS_AT_ONCE = 64
"""With a cache a token costs little, and to read the prompt again costs much."""
_ROWS_OF_LOGITS = 512
"""Positions whose logits are in memory together: a long text times a large vocabulary is not."""


class CheckpointAnswerer(TokenAnswerer):
    """A trained model of this project.

    Attributes:
        run: the run's name.
        step: of the checkpoint.
        selector: what chooses blocks here.
        topk: selected blocks per query here; None where nothing is selected.
        train_topk: k in training; None for a run with dense attention.
        attention: the settings that the layers use here.
        without_cache: why every new token reads the whole text again; None where there is a cache.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        groups: Groups,
        tokenizer: Tokenizer,
        *,
        step: int,
        own_kind: AttentionKind,
        selector: str = OWN,
        topk: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Look at a loaded model in one way; several of these may share one model.

        Args:
            model: the bare model, built with `attention.kind=phsa`, weights loaded.
            config: of the run, for one process, with this kind.
            groups: of the one process.
            tokenizer: the run's.
            step: of the checkpoint.
            own_kind: the attention that the run was trained with.
            selector: own, dense, or a selector's name.
            topk: selected blocks per query; None is the run's own in inference.
            max_tokens: most tokens of a text; None is the training length.

        Raises:
            ConfigError: no such selector for this run, or k < 1.
        """
        own = config.attention
        self._model, self._groups, self._tokenizer = model, groups, tokenizer
        self.attention = _attention(own, own_kind, selector, topk, config.model.num_layers)
        is_dense = len(self.attention.dense_layers) == config.model.num_layers
        self.selector = DENSE if is_dense else self.attention.selector.value
        self.topk = (
            inference_topk(self.attention) if selects_blocks(self.attention) and not is_dense else None
        )
        self.train_topk = own.train_topk if own_kind is AttentionKind.phsa and selects_blocks(own) else None
        self.run, self.step = config.run.name, step
        self.name = f"{self.run}, {self.selector}" + ("" if self.topk is None else f", k = {self.topk}")
        self.max_tokens = max_tokens or config.data.seq_len_tokens
        self.eod_id = tokenizer.eod_id
        self._table = table_of(tokenizer.decoded_tokens(), self.attention).to(groups.device)
        self._config = dataclasses.replace(config, attention=self.attention)
        self.without_cache = why_not_cached(self.attention)
        self._generator: Generator | None = None
        if self.without_cache is None:
            self.tokens_at_once = _TOKENS_AT_ONCE
            self._generator = Generator(
                model, self._config, self._table, vocab_size=tokenizer.vocab_size, eod_id=self.eod_id
            )
        self._has_told = False

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode(ids)

    def continued(self, ids: list[int], num_tokens: int) -> list[int]:
        """Return at most `num_tokens` most likely tokens after `ids`.

        Where the selector has no cache, stderr gets the reason once.
        """
        with attending([self._model], self.attention):
            if self._generator is not None:
                return self._generator.generate([ids], Sampling(max_tokens=num_tokens))[0].tokens
            if not self._has_told:
                print(f"{self.name}: generated without a cache: {self.without_cache}", file=sys.stderr)
                self._has_told = True
            return generate(
                [self._model],
                ids,
                num_tokens,
                config=self._config,
                groups=self._groups,
                table=self._table,
                vocab_size=self._tokenizer.vocab_size,
                eod_id=self.eod_id,
            )

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Return the scores of the tokens `first ..` of each document.

        Documents share a row up to the length that the run trained with: attention never leaves a document,
        so a row is a batch without padding.

        Raises:
            ConfigError: a document is longer than `max_tokens`.
        """
        row_tokens = self._config.data.seq_len_tokens
        found: list[Scored] = []
        row: list[Request] = []
        for request in requests:
            self.check_length(len(request.ids))
            if row and sum(len(r.ids) for r in row) + len(request.ids) > row_tokens:
                found += self._score_row(row)
                row = []
            row.append(request)
        return found + (self._score_row(row) if row else [])

    @torch.no_grad()
    def _score_row(self, row: list[Request]) -> list[Scored]:
        bounds = [0]
        for request in row:
            bounds.append(bounds[-1] + len(request.ids))
        wanted = [
            start + i
            for start, request in zip(bounds, row, strict=False)
            for i in range(request.first, len(request.ids))
        ]
        length = -(-bounds[-1] // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        tokens = torch.zeros(1, length, dtype=torch.int64)
        tokens[0, : bounds[-1]] = torch.tensor([i for request in row for i in request.ids])
        tokens = tokens.to(self._groups.device)
        # Repeated boundaries are empty documents: the padding is one of its own, or none.
        cu_seqlens = torch.tensor([*bounds, length], dtype=torch.int32, device=tokens.device)
        side_info = SideInfo.build(
            tokens, cu_seqlens, self._table, self.attention, inference_topk(self.attention)
        )
        with attending([self._model], self.attention):
            logprobs, greedy = _scores(
                self._model,
                tokens,
                side_info,
                torch.tensor(wanted, device=tokens.device),
                self._tokenizer.vocab_size,
                self._config.model.mtp_num_layers > 0,
            )
        sizes = [len(request.ids) - request.first for request in row]
        return [
            Scored(*pair)
            for pair in zip(torch.split(logprobs, sizes), torch.split(greedy, sizes), strict=True)
        ]


def _scores(
    model: Any, tokens: Tensor, side_info: SideInfo, wanted: Tensor, vocab_size: int, predicts_further: bool
) -> Scored:
    """Return the scores of the tokens at `wanted`, int64 [n].

    The hidden states are taken in front of the output layer, which then sees a few of them at a time. A
    model with multi-token prediction needs labels and uses the output layer on the way; the main stack's
    call is the last.
    """
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def before(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        seen.append((args[0], kwargs))
        return None if predicts_further else ((args[0][:1], *args[1:]), kwargs)

    hook = model.output_layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        labels = tokens if predicts_further else None
        model(tokens, positions, None, labels=labels, packed_seq_params=side_info)
    finally:
        hook.remove()
    hidden, kwargs = seen[-1]
    return scored(
        (model.output_layer(hidden[part - 1], **kwargs)[0][:, 0, :vocab_size], tokens[0, part])
        for part in torch.split(wanted, _ROWS_OF_LOGITS)
    )


def _attention(
    own: AttentionConfig, own_kind: AttentionKind, selector: str, topk: int | None, num_layers: int
) -> AttentionConfig:
    """Return the layers' settings."""
    known = [OWN, DENSE, *(s.value for s in Selector)]
    if selector not in known:
        raise ConfigError(
            f"selectors: {selector!r} is none.{did_you_mean(selector, known)} They are: {', '.join(known)}"
        )
    if topk is not None and topk < 1:
        raise ConfigError(f"topk={topk} must be at least 1")
    if selector == DENSE and own.selector is Selector.nsa:
        raise ConfigError(
            "selectors: dense: this run was trained with attention.selector=nsa, whose layers have no full "
            "attention to fall back to; ask for own"
        )
    if selector == DENSE or (selector == OWN and own_kind is AttentionKind.dense):
        return dataclasses.replace(own, dense_layers=list(range(1, num_layers + 1)))
    settings = own if selector == OWN else swapped(own, Selector(selector))
    return settings if topk is None else dataclasses.replace(settings, infer_topk=topk)


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run's model in memory.

    Attributes:
        config: of the run, for one process.
        step: of the checkpoint.
    """

    config: TrainConfig
    step: int
    _model: torch.nn.Module
    _groups: Groups
    _tokenizer: Tokenizer
    _own_kind: AttentionKind

    def answerer(
        self, selector: str = OWN, topk: int | None = None, max_tokens: int | None = None
    ) -> CheckpointAnswerer:
        """Return the model with this selector and k.

        Raises:
            ConfigError: no such selector, or k < 1.
        """
        return CheckpointAnswerer(
            self._model,
            self.config,
            self._groups,
            self._tokenizer,
            step=self.step,
            own_kind=self._own_kind,
            selector=selector,
            topk=topk,
            max_tokens=max_tokens,
        )


@contextmanager
def open_run(path: Path, step: int | None = None, impl: KernelImpl | None = None) -> Iterator[OpenRun]:
    """Load a run's checkpoint into this process, whatever layout wrote it.

    Args:
        path: the run folder.
        step: of the checkpoint; None is the newest.
        impl: implementation of the attention's ops; None is the run's own.

    Raises:
        PhsaError: no run, no such checkpoint, or one that cannot be read here.
    """
    folder = RunFolder(path)
    config = single_process(compose.load(folder.existing_config()))
    checkpoint = find_checkpoint(folder, step)
    own_kind = config.attention.kind
    # Weights are the same: a dense run is built so that it can also select.
    config.attention.kind = AttentionKind.phsa
    if impl is not None:
        config.attention.impl = impl
    groups = initialize(config)
    try:
        model = load_model(checkpoint, config, groups)
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        yield OpenRun(config, read_marker(checkpoint).step, model, groups, tokenizer, own_kind)
    finally:
        groups.close()
