"""PHSA as attention implementations of transformers: `phsa` (Triton kernels) and `phsa_eager` (PyTorch).

    model = AutoModelForCausalLM.from_pretrained(folder)
    use_phsa(model, implementation="phsa_eager")     # settings and punctuation set from the folder
    model.generate(...)

An attention function of transformers sees keys, not token ids. `use_phsa` adds a hook that passes on, with
each forward pass, what follows from the ids of all keys; ids of earlier tokens are kept in the key-value
cache itself, as a layer of their own, so that they are reordered, repeated and cropped with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from phsa_megatron.attention.cached_rows import CachedRows, attend_rows
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, KernelImpl
from phsa_megatron.convert.phsa_entry import KEY, read_phsa_entry

IMPLEMENTATIONS = {"phsa": KernelImpl.triton, "phsa_eager": KernelImpl.reference}
"""Names for `attn_implementation`, and the kernels that each runs."""

_MODEL_TYPES = ("qwen3", "llama")
_ROWS = "phsa_rows"

_Model = TypeVar("_Model", bound=PreTrainedModel)


def register() -> None:
    """Make `phsa` and `phsa_eager` known to transformers; importing this module does it."""
    for name in IMPLEMENTATIONS:
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, _no_mask)


def use_phsa(
    model: _Model,
    attention: AttentionConfig | None = None,
    table: PunctuationTable | None = None,
    *,
    implementation: str | None = None,
) -> _Model:
    """Let a Qwen3 or Llama of transformers attend by PHSA from now on, and return it.

    Args:
        model: changed in place; calling again changes the settings.
        attention: the settings, `infer_topk` (or `train_topk`) is k; None takes those of an exported folder.
        table: punctuation set of the model's tokenizer; None takes that of an exported folder.
        implementation: `phsa` or `phsa_eager`; None keeps what the model was loaded with.

    Raises:
        ConfigError: the model is of another kind, or settings or table are given nowhere.
    """
    config = model.config
    if config.model_type not in _MODEL_TYPES or "sliding_attention" in getattr(config, "layer_types", []):
        raise ConfigError(
            f"{type(model).__name__} (model_type={config.model_type!r}): PHSA serves "
            f"{', '.join(_MODEL_TYPES)} whose layers all have full attention"
        )
    name = implementation or config._attn_implementation
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"implementation={name!r}: use one of {', '.join(IMPLEMENTATIONS)}, here or as "
            "attn_implementation of from_pretrained"
        )
    attention, table = _settings(model, attention, table)
    if attention.kind != AttentionKind.phsa:
        raise ConfigError(
            f"attention.kind={attention.kind}: this model was trained with dense attention; give settings "
            "with kind=phsa to run it with PHSA all the same"
        )
    attention = dataclasses.replace(attention, impl=IMPLEMENTATIONS[name])
    before = getattr(model, "_phsa_hook", None)
    if before is not None:
        before.remove()
    hook = _PassesTokenIds(attention, _padded(table, config.vocab_size))
    model._phsa_hook = model.base_model.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[assignment]
    model.set_attn_implementation(name)
    return model


def _settings(
    model: PreTrainedModel, attention: AttentionConfig | None, table: PunctuationTable | None
) -> tuple[AttentionConfig, PunctuationTable]:
    entry = getattr(model.config, KEY, None)
    if entry is not None:
        theirs = read_phsa_entry(entry, model.name_or_path or "this model")
        return attention or theirs[0], table or theirs[1]
    if attention is None or table is None:
        raise ConfigError(
            f"{model.name_or_path}: its config.json has no entry '{KEY}', so it says neither which blocks to "
            "select nor which tokens are punctuation: pass attention= and table= (PunctuationTable.build of "
            "the tokenizer's decoded tokens), or a folder from phsa-train export-hf"
        )
    return attention, table


def _padded(table: PunctuationTable, vocab_size: int) -> PunctuationTable:
    """Return the table with flags for rows of the embedding that no token uses, too."""
    missing = vocab_size - len(table.is_punctuation)
    flags = torch.nn.functional.pad(table.is_punctuation, (0, max(missing, 0)))
    return dataclasses.replace(table, is_punctuation=flags)


class _TokenIds(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of the cache that holds token ids, int64 [b, 1, T, 1], as keys and as values."""


class _PassesTokenIds:
    """A forward pre-hook of the decoder: adds `phsa_rows` to the arguments that reach every layer."""

    def __init__(self, attention: AttentionConfig, table: PunctuationTable) -> None:
        self.attention = attention
        self.table = table

    def __call__(
        self, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if decoder.config._attn_implementation not in IMPLEMENTATIONS:
            return None
        if len(args) > 1:
            raise ValueError(f"pass all arguments but input_ids by name, got {len(args)} without a name")
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("PHSA needs input_ids: embeddings do not say which tokens are punctuation")
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (decoder.config.use_cache if use_cache is None else use_cache):
            # transformers would make it later, where token ids can no longer be kept in it.
            cache = DynamicCache(config=decoder.config)
            kwargs = {**kwargs, "past_key_values": cache}
        token_ids = input_ids if cache is None else _with_earlier(cache, input_ids, decoder)
        start, end = _text_bounds(token_ids, kwargs.get("attention_mask"))
        _check_positions(kwargs.get("position_ids"), token_ids, start, end)
        num_new = input_ids.shape[1]
        self._check_dense_len(end - start, token_ids.shape[1] - num_new, num_new)
        if self.table.is_punctuation.device != token_ids.device:
            self.table = self.table.to(token_ids.device)
        rows = CachedRows.build(token_ids, start, end, num_new, self.table, self.attention)
        return args, {**kwargs, _ROWS: rows}

    def _check_dense_len(self, lengths: Tensor, num_earlier: int, num_new: int) -> None:
        limit = self.attention.dense_len_tokens
        if limit and num_earlier and bool(((lengths > limit) & (lengths - num_new <= limit)).any()):
            raise ConfigError(
                f"attention.dense_len_tokens={limit}: a text that grows past it while its keys are cached "
                "would differ from the same text computed at once, where all its tokens select blocks; set "
                "it to 0, or generate with use_cache=False"
            )


def _with_earlier(cache: Any, input_ids: Tensor, decoder: PreTrainedModel) -> Tensor:
    """Return the ids [b, T] of all tokens whose keys the cache holds after this pass, and keep them in it."""
    num_layers = decoder.config.num_hidden_layers
    if not isinstance(cache, DynamicCache) or any(
        type(layer) not in (DynamicLayer, _TokenIds) for layer in cache.layers
    ):
        raise ConfigError(
            f"past_key_values is a {type(cache).__name__}: PHSA reads keys of all tokens, and nothing but "
            "them, from a DynamicCache; leave cache_implementation at its default"
        )
    while len(cache.layers) < num_layers:  # a cache made without the model's config adds layers when used
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    num_earlier = cache.get_seq_length()
    if len(cache.layers) == num_layers:
        if num_earlier:
            raise ConfigError(
                f"past_key_values holds {num_earlier} tokens whose ids are not known: fill the cache after "
                "use_phsa, with the same model"
            )
        cache.layers.append(_TokenIds())  # type: ignore[no-untyped-call]
    ids = cache.layers[num_layers]
    if ids.get_seq_length() != num_earlier:
        raise ConfigError(
            f"past_key_values holds keys of {num_earlier} tokens and ids of {ids.get_seq_length()}: an "
            "earlier pass failed half-way; start with a fresh cache"
        )
    column = input_ids[:, None, :, None]
    all_ids: Tensor = ids.update(column, column)[0][:, 0, :, 0]
    return all_ids


def _text_bounds(token_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (first token of each row's text, past the last), int64 [b]; the rest of a row is padding."""
    num_rows, length = token_ids.shape
    if attention_mask is None:
        zero = torch.zeros(num_rows, dtype=torch.int64, device=token_ids.device)
        return zero, zero + length
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != (num_rows, length):
        shape = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask is {shape}, PHSA takes [b, T] = {(num_rows, length)}: 1 for the tokens of the "
            "text, cached ones included, 0 for padding"
        )
    seen = attention_mask.to(token_ids.device).bool()
    start = seen.int().argmax(dim=1)
    end = start + seen.sum(dim=1)
    position = torch.arange(length, device=token_ids.device)
    if not torch.equal(seen, (position >= start[:, None]) & (position < end[:, None])):
        raise ValueError(
            "attention_mask has holes: the text of a row must be in one piece; pad on the left for generation"
        )
    return start, end


def _check_positions(position_ids: Tensor | None, token_ids: Tensor, start: Tensor, end: Tensor) -> None:
    """Refuse positions that are not those of one text a row: packed documents would attend to each other."""
    if position_ids is None:
        return
    num_queries = position_ids.shape[-1]
    index = torch.arange(token_ids.shape[1], device=token_ids.device)[-num_queries:]
    inside = (index >= start[:, None]) & (index < end[:, None])
    offset = position_ids.to(token_ids.device) - index
    low = offset.masked_fill(~inside, torch.iinfo(torch.int64).max).amin(1)
    high = offset.masked_fill(~inside, torch.iinfo(torch.int64).min).amax(1)
    if bool((high > low).any()):
        raise ValueError(
            "position_ids do not count up by one inside the text of a row: packed documents are not served "
            "here; give one document a row"
        )


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (output [b, Q, Hq, D], None) for query [b, Hq, Q, D], key and value [b, Hkv, T, D]."""
    rows = kwargs.get(_ROWS)
    if not isinstance(rows, CachedRows):
        raise ConfigError(
            "this model has PHSA attention but no settings and no punctuation set yet: call "
            "phsa_megatron.convert.transformers_attention.use_phsa(model) after loading it"
        )
    if attention_mask is not None:
        raise ValueError("PHSA takes a 2-D attention_mask of padding only, not a mask of pairs of tokens")
    if dropout:
        raise ConfigError(f"attention_dropout={dropout}: PHSA has none; set it to 0")
    if rows.attention.impl == KernelImpl.triton and not query.is_cuda:
        raise DeviceError(
            f"attn_implementation='phsa' runs Triton kernels on a CUDA device, and the model is on "
            f"{query.device}: move it there, or use phsa_eager"
        )
    layer_number = int(module.layer_idx) + 1  # type: ignore[arg-type]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return attend_rows(q, k, v, rows, layer_number, scaling), None


def _no_mask(*_: Any, use_vmap: bool = False, **__: Any) -> None:
    """Documents and causality come from `phsa_rows`.

    Raises:
        ValueError: the model adds a mask of its own, which would be lost.
    """
    if use_vmap:
        raise ValueError("this model combines causal attention with another mask, which PHSA does not know")


register()
