"""The settings of the attention: what selects blocks, how, and by which implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class AttentionKind(StrEnum):
    """What a layer's core attention computes."""

    phsa = "phsa"
    dense = "dense"


class KernelImpl(StrEnum):
    """Which implementation of the ops runs; it is used or refused, never swapped."""

    reference = "reference"
    triton = "triton"


class Selector(StrEnum):
    """What chooses the blocks of `kind=phsa` (kernels/README.md has the formulas)."""

    phsa = "phsa"
    mean_pool = "mean_pool"
    random_tokens = "random_tokens"
    last_token = "last_token"
    shuffled = "shuffled"
    separators = "separators"
    max_norm = "max_norm"
    minmax = "minmax"
    cumulant = "cumulant"
    halves = "halves"
    infllm_v2 = "infllm_v2"
    moba = "moba"
    nsa = "nsa"
    indexer = "indexer"
    window = "window"
    dense_window = "dense_window"


class TopkSchedule(StrEnum):
    """How k changes over the steps of training."""

    constant = "constant"
    anneal = "anneal"
    random_step = "random_step"
    random_layer = "random_layer"


class GroupScore(StrEnum):
    """How the scores of the query heads of one key-value group become one score (method, section 3)."""

    softmax_sum = "softmax_sum"
    raw_sum = "raw_sum"


class PunctuationMatch(StrEnum):
    """Which decoded tokens count as punctuation (method, section 1)."""

    exact = "exact"
    exact_any = "exact_any"
    strip_any = "strip_any"


class PunctuationLanguage(StrEnum):
    """Whose punctuation marks are in the set."""

    en = "en"
    en_zh = "en_zh"


@dataclass
class AttentionConfig:
    """The attention of every layer. The method page numbers are in brackets."""

    kind: AttentionKind = AttentionKind.phsa
    """phsa (init, local and selected blocks) or dense."""
    selector: Selector = Selector.phsa
    """What chooses the blocks of kind=phsa: PHSA's pooled key, a baseline, a control or a better pool."""
    impl: KernelImpl = KernelImpl.reference
    """Implementation of the PHSA ops; used or refused, never swapped."""
    select_impl: KernelImpl | None = None
    """What chooses blocks for a selector without a kernel, beside impl=triton: reference; null is impl."""
    block_tokens: int = 16
    """Keys per block (m) [1]."""
    init_tokens: int = 16
    """Tokens at the start of the document that every query attends to; a multiple of block_tokens [3]."""
    local_tokens: int = 128
    """Local window: the current block and the blocks before it; a multiple of block_tokens [3]."""
    train_topk: int = 2
    """Selected blocks per query token and key-value head in training (k) [3, 4]."""
    infer_topk: int | None = None
    """Selected blocks in evaluation and generation; null uses train_topk [4]."""
    mean_weight_frac: float = 0.5
    """lambda: weight of the plain block mean against the punctuation mean; 1 is plain mean pooling [2]."""
    group_score: GroupScore = GroupScore.softmax_sum
    """How a group's heads share one selection [3]."""
    punctuation_match: PunctuationMatch = PunctuationMatch.exact
    """Which decoded tokens count as punctuation [1]."""
    punctuation_language: PunctuationLanguage = PunctuationLanguage.en
    """English marks only, or English and Chinese [1]."""
    dense_len_tokens: int = 0
    """Documents of up to this many tokens get full causal attention; 0 never [4]."""
    control_seed: int = 0
    """Seed of the selectors random_tokens and shuffled."""
    coarse_lse: bool = False
    """selector=infllm_v2: take the softmax normalizer from coarser windows (128 tokens at stride 64)."""
    dense_layers: list[int] = field(default_factory=list)
    """Numbers, from 1, of the layers with full causal attention."""
    topk_schedule: TopkSchedule = TopkSchedule.constant
    """constant: train_topk; anneal: from topk_start to it; random_step, random_layer: of topk_choices [4]."""
    topk_dense_steps: int = 0
    """First steps of training with full causal attention in every layer; schedules begin after them."""
    topk_start: int | None = None
    """anneal: k of its first step."""
    topk_anneal_steps: int = 0
    """anneal: steps until k is train_topk; k falls by equal factors."""
    topk_choices: list[int] = field(default_factory=list)
    """random_step, random_layer: the values of k, all equally likely; one is drawn per step, or per layer."""
    nsa_window_tokens: int | None = None
    """selector=nsa: tokens of the sliding-window branch; init and local are those of the selected branch."""
    indexer_heads: int = 4
    """selector=indexer: index heads of each key-value head; an index head is as wide as the model's."""
    indexer_coeff: float = 1.0
    """selector=indexer: weight of its distillation loss; the loss trains nothing but the indexer."""
    align_coeff: float = 0.0
    """Weight of SSA's alignment of sparse and full attention outputs; 0 is off, the paper has 10."""
    align_full_frac: float = 0.5
    """align_coeff > 0: share of the training steps whose layers pass on full attention's output."""
