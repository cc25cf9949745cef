"""The rules of selectors with weights of their own, and of losses between attentions.

`attention_rules.py` runs them with the other rules of the attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from phsa_megatron.config.rule_messages import Rule, broken
from phsa_megatron.config.schema import AttentionConfig, Recompute, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector, selects_blocks

_DEFAULTS = {field.name: field.default for field in fields(AttentionConfig)}


def _nsa_window(config: TrainConfig) -> Iterator[str]:
    attention, window = config.attention, config.attention.nsa_window_tokens
    if attention.selector == Selector.nsa and window is None:
        yield broken(
            "attention.nsa_window_tokens",
            None,
            "attention.selector=nsa has a sliding-window branch of this many tokens",
            "set it, or take attention=nsa or attention=nsa_block64",
        )
    if attention.selector != Selector.nsa and window is not None:
        yield broken(
            "attention.nsa_window_tokens",
            window,
            f"attention.selector={attention.selector} has no sliding-window branch of its own",
            "set attention.nsa_window_tokens=null, or attention=nsa",
        )


def _settings_of_another_selector(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    for name in ("indexer_heads", "indexer_coeff"):
        value = getattr(attention, name)
        if attention.selector != Selector.indexer and value != _DEFAULTS[name]:
            yield broken(
                f"attention.{name}",
                value,
                f"it belongs to attention.selector=indexer, and the selector is {attention.selector}",
                f"set attention=indexer, or leave attention.{name}={_DEFAULTS[name]}",
            )
    if not attention.align_coeff and attention.align_full_frac != _DEFAULTS["align_full_frac"]:
        yield broken(
            "attention.align_full_frac",
            attention.align_full_frac,
            "it belongs to the alignment loss, and attention.align_coeff is 0",
            "set attention.align_coeff=10, or leave attention.align_full_frac=0.5",
        )


def _align(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.align_coeff and (not selects_blocks(attention) or attention.selector == Selector.nsa):
        which = f"attention.kind={attention.kind} attention.selector={attention.selector}"
        yield broken(
            "attention.align_coeff",
            attention.align_coeff,
            "it aligns attention over selected blocks with full attention over the same keys and values, and "
            f"{which} does not have both",
            "set attention.align_coeff=0, or a selector of one branch such as attention=phsa",
        )


def _learned_context(config: TrainConfig) -> Iterator[str]:
    attention, size = config.attention, config.parallel.context_size
    learned = learned_selector(attention)
    if size == 1 or not (learned or attention.align_coeff):
        return
    what = f"attention.selector={learned}" if learned else f"attention.align_coeff={attention.align_coeff:g}"
    yield broken(
        "parallel.context_size",
        size,
        f"{what} reads whole sequences in each process",
        "set parallel.context_size=1 (tensor, sequence, pipeline and data parallelism all run)",
    )


def _learned_everywhere(config: TrainConfig) -> Iterator[str]:
    """Weights that a step leaves without a gradient would wait in megatron's buckets for ever."""
    attention = config.attention
    learned = learned_selector(attention)
    asked: dict[str, list[int] | int] = {"dense_layers": attention.dense_layers}
    if learned == Selector.nsa:
        asked |= {
            "dense_len_tokens": attention.dense_len_tokens,
            "topk_dense_steps": attention.topk_dense_steps,
        }
    for name, value in asked.items():
        if learned and value:
            yield broken(
                f"attention.{name}",
                value,
                f"attention.selector={learned} has weights in every layer that full causal attention leaves "
                "unused",
                f"leave attention.{name}={'[]' if isinstance(value, list) else 0}",
            )


def _nsa_recompute(config: TrainConfig) -> Iterator[str]:
    """The indexer may be recomputed by itself: no gradient goes from it to the layer's input."""
    recompute = config.parallel.recompute
    if learned_selector(config.attention) == Selector.nsa and recompute == Recompute.selective:
        yield broken(
            "parallel.recompute",
            recompute,
            "gates and keys of attention.selector=nsa come from the layer's input, which recomputation of "
            "the core attention alone does not see",
            "set parallel.recompute=full or none",
        )


LEARNED_RULES: tuple[Rule, ...] = (
    _nsa_window,
    _settings_of_another_selector,
    _align,
    _learned_context,
    _learned_everywhere,
    _nsa_recompute,
)
"""All of them, in the order of their messages."""
