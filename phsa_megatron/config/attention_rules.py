"""Every rule of the attention's settings: a requested combination is used, or refused here.

Each yields messages as the rules in `validate.py` do.
"""

from __future__ import annotations

from collections.abc import Iterator

from phsa_megatron.config.learned_rules import LEARNED_RULES
from phsa_megatron.config.rule_messages import Rule, broken
from phsa_megatron.config.schema import (
    AttentionKind,
    GroupScore,
    KernelImpl,
    PunctuationLanguage,
    PunctuationMatch,
    Selector,
    TopkSchedule,
    TrainConfig,
)
from phsa_megatron.config.selector_kinds import (
    EAGER_ONLY,
    OWN_GROUP_SCORE,
    WITH_KERNELS,
    WITH_PARAMETERS,
    WITHOUT_SECOND_BRANCH,
    WITHOUT_SELECTION,
)

_DRAWN = (TopkSchedule.random_step, TopkSchedule.random_layer)
_MOST_TRITON_BLOCKS = 64


def _topk(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    for name, k in (("train_topk", attention.train_topk), ("infer_topk", attention.infer_topk)):
        if k is not None and k < 1:
            yield broken(
                f"attention.{name}",
                k,
                "a query selects at least one block",
                f"set attention.{name}=1 or more; for attention without selection use attention.kind=dense",
            )


def _head_group(config: TrainConfig) -> Iterator[str]:
    query, kv = config.model.num_query_heads, config.model.num_kv_heads
    if config.attention.kind == AttentionKind.phsa and query % kv == 0 and query // kv > 16:
        yield broken(
            "model.num_kv_heads",
            kv,
            f"{query} query heads make groups of {query // kv}, and PHSA serves groups of 1 to 16",
            f"use at least {-(-query // 16)} key-value heads",
        )


def _windows(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.kind == AttentionKind.dense:
        return
    m = attention.block_tokens
    for name, tokens in (("init_tokens", attention.init_tokens), ("local_tokens", attention.local_tokens)):
        if tokens % m and not (name == "local_tokens" and tokens < m):
            yield broken(
                f"attention.{name}",
                tokens,
                f"windows are whole blocks of attention.block_tokens={m}",
                f"use {tokens // m * m} or {(tokens // m + 1) * m}",
            )
    if attention.local_tokens < m:
        yield broken(
            "attention.local_tokens",
            attention.local_tokens,
            f"the current block of attention.block_tokens={m} is always attended to",
            f"use at least {m}",
        )


def _sequence_and_block(config: TrainConfig) -> Iterator[str]:
    length, m = config.data.seq_len_tokens, config.attention.block_tokens
    if config.attention.kind == AttentionKind.phsa and length < m:
        yield broken(
            "data.seq_len_tokens",
            length,
            f"a sequence holds at least one block of attention.block_tokens={m}",
            f"use at least {m}",
        )


def _selector_of_dense(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.kind == AttentionKind.dense and attention.selector != Selector.phsa:
        yield broken(
            "attention.selector",
            attention.selector,
            "dense attention selects nothing",
            "set attention.kind=phsa, or leave attention.selector=phsa",
        )


def _selector_impl(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    eager_only = attention.selector in EAGER_ONLY
    apart = EAGER_ONLY - WITH_PARAMETERS
    if attention.select_impl is not None and (
        attention.select_impl != KernelImpl.reference
        or attention.selector not in apart
        or attention.kind == AttentionKind.dense
    ):
        yield broken(
            "attention.select_impl",
            attention.select_impl,
            f"only a selector without a kernel ({', '.join(sorted(apart))}) chooses apart from "
            "attention.impl, and then by reference",
            "set attention.select_impl=null, and attention.impl for everything",
        )
    if attention.impl == KernelImpl.triton and eager_only and attention.select_impl is None:
        served = ", ".join(sorted(WITH_KERNELS | {Selector.window}))
        yield broken(
            "attention.selector",
            attention.selector,
            f"attention.impl=triton scores pooled vectors of a block by their dot products: {served}",
            "set attention.select_impl=reference (an eager choice, attention by Triton), "
            "attention.impl=reference, or one of these selectors",
        )


def _selector_lambda(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.selector in WITHOUT_SECOND_BRANCH and attention.mean_weight_frac != 1:
        yield broken(
            "attention.mean_weight_frac",
            attention.mean_weight_frac,
            f"attention.selector={attention.selector} has no second branch to weigh against the mean",
            f"set attention.mean_weight_frac=1 (attention={attention.selector} does)",
        )


def _selector_group_score(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.selector in OWN_GROUP_SCORE and attention.group_score != GroupScore.softmax_sum:
        yield broken(
            "attention.group_score",
            attention.group_score,
            f"attention.selector={attention.selector} has its own way to share a selection among heads",
            "leave attention.group_score=softmax_sum",
        )


def _selector_blocks(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    unit = {Selector.infllm_v2: 16, Selector.nsa: 16, Selector.halves: 2}.get(attention.selector, 1)
    if attention.block_tokens % unit:
        yield broken(
            "attention.block_tokens",
            attention.block_tokens,
            f"attention.selector={attention.selector} cuts blocks into parts of a multiple of {unit}",
            f"use a multiple of {unit}",
        )


def _separators(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    plain = (PunctuationMatch.exact, PunctuationLanguage.en)
    if attention.selector == Selector.separators and plain != (
        attention.punctuation_match,
        attention.punctuation_language,
    ):
        yield broken(
            "attention.selector",
            attention.selector,
            "SepLLM's separators are a set of their own, and attention.punctuation_match="
            f"{attention.punctuation_match} with attention.punctuation_language="
            f"{attention.punctuation_language} is another",
            "set attention.punctuation_match=exact attention.punctuation_language=en",
        )


def _coarse_lse(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.coarse_lse and attention.selector != Selector.infllm_v2:
        yield broken(
            "attention.coarse_lse",
            True,
            "it is InfLLM-V2's approximate normalizer",
            "set attention.selector=infllm_v2, or attention.coarse_lse=false",
        )


def _topk_without_selection(config: TrainConfig) -> Iterator[str]:
    attention = config.attention
    if attention.selector in WITHOUT_SELECTION and attention.infer_topk is not None:
        yield broken(
            "attention.infer_topk",
            attention.infer_topk,
            f"attention.selector={attention.selector} selects no block",
            "set attention.infer_topk=null",
        )


def _dense_layers(config: TrainConfig) -> Iterator[str]:
    layers, count = config.attention.dense_layers, config.model.num_layers
    if any(not 1 <= number <= count for number in layers) or len(set(layers)) < len(layers):
        yield broken(
            "attention.dense_layers",
            layers,
            f"layers are numbered from 1 to model.num_layers={count}, each at most once",
            "correct the list",
        )
    elif layers and config.attention.kind == AttentionKind.dense:
        yield broken(
            "attention.dense_layers",
            layers,
            "attention.kind=dense makes every layer dense",
            "set attention.dense_layers=[], or attention.kind=phsa",
        )


def _topk_schedule(config: TrainConfig) -> Iterator[str]:
    """What belongs to another schedule is refused, and so is what a schedule lacks."""
    a = config.attention
    anneals = a.topk_schedule == TopkSchedule.anneal
    if anneals and (a.topk_start is None or a.topk_start <= a.train_topk or a.topk_anneal_steps < 1):
        yield broken(
            "attention.topk_schedule",
            a.topk_schedule,
            f"k falls from attention.topk_start={a.topk_start} to attention.train_topk={a.train_topk} over "
            f"attention.topk_anneal_steps={a.topk_anneal_steps} steps",
            f"set attention.topk_start to more than {a.train_topk} and attention.topk_anneal_steps to 1 or "
            "more",
        )
    if not anneals and (a.topk_start is not None or a.topk_anneal_steps):
        yield broken(
            "attention.topk_schedule",
            a.topk_schedule,
            f"attention.topk_start={a.topk_start} and attention.topk_anneal_steps={a.topk_anneal_steps} "
            "belong to anneal",
            "set attention.topk_schedule=anneal, or leave them null and 0",
        )
    drawn = a.topk_schedule in _DRAWN
    if drawn != bool(a.topk_choices) or any(k < 1 for k in a.topk_choices):
        yield broken(
            "attention.topk_choices",
            a.topk_choices,
            f"random_step and random_layer draw k, at least 1, from this list, and attention.topk_schedule "
            f"is {a.topk_schedule}",
            "set both, such as attention.topk_schedule=random_step attention.topk_choices=[1,2,4,8]",
        )


def _topk_schedule_of_what(config: TrainConfig) -> Iterator[str]:
    a = config.attention
    scheduled = a.topk_schedule != TopkSchedule.constant
    if scheduled and (a.kind == AttentionKind.dense or a.selector in WITHOUT_SELECTION):
        what = "kind=dense" if a.kind == AttentionKind.dense else f"selector={a.selector}"
        yield broken(
            "attention.topk_schedule",
            a.topk_schedule,
            f"attention.{what} has no k",
            "set attention.topk_schedule=constant",
        )
    if a.topk_dense_steps and a.kind == AttentionKind.dense:
        yield broken(
            "attention.topk_dense_steps",
            a.topk_dense_steps,
            "attention.kind=dense is dense in every step",
            "set attention.topk_dense_steps=0, or attention.kind=phsa",
        )


def _topk_of_triton(config: TrainConfig) -> Iterator[str]:
    a = config.attention
    if a.impl != KernelImpl.triton or a.kind == AttentionKind.dense:
        return
    asked = {
        "train_topk": a.train_topk,
        "infer_topk": a.infer_topk or 0,
        "topk_start": a.topk_start or 0,
        "topk_choices": max(a.topk_choices, default=0),
    }
    for name, k in asked.items():
        if k > _MOST_TRITON_BLOCKS:
            yield broken(
                f"attention.{name}",
                k,
                f"attention.impl=triton selects at most {_MOST_TRITON_BLOCKS} blocks",
                "use a smaller k, or attention.impl=reference",
            )


def _information(config: TrainConfig) -> Iterator[str]:
    attention, every = config.attention, config.monitoring.information_every_steps
    dense = attention.kind == AttentionKind.dense
    if every and (dense or attention.selector == Selector.dense_window):
        what = "kind=dense" if dense else "selector=dense_window"
        yield broken(
            "monitoring.information_every_steps",
            every,
            f"attention.{what} has no blocks to measure",
            "set monitoring.information_every_steps=0",
        )


ATTENTION_RULES: tuple[Rule, ...] = (
    _topk,
    _head_group,
    _windows,
    _sequence_and_block,
    _selector_of_dense,
    _selector_impl,
    _selector_lambda,
    _selector_group_score,
    _selector_blocks,
    _separators,
    _coarse_lse,
    _topk_without_selection,
    _dense_layers,
    _topk_schedule,
    _topk_schedule_of_what,
    _topk_of_triton,
    _information,
    *LEARNED_RULES,
)
"""All rules of the attention, in the order of their messages."""
