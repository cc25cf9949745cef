"""The FLOPs behind utilization against a count of what the reference does, product by product."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from phsa_kernels import reference, selectors
from phsa_megatron.attention import dense_attention
from phsa_megatron.config.document_flops import DocumentFlops
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.step import forward_backward

SHAPES = {
    "grouped": {},
    "one_group_per_head": {
        "model.num_layers": 1, "model.num_query_heads": 2, "model.head_dim": 16, "data.seq_len_tokens": 96,
        "model.ffn_hidden_size": 48,
    },
    "untied_with_mtp": {
        "model.num_layers": 3, "model.num_query_heads": 8, "model.tie_embeddings": False,
        "model.mtp_num_layers": 1, "data.seq_len_tokens": 128,
    },
}  # fmt: skip
ATTENTIONS = {
    "dense": {"attention.kind": "dense"},
    "phsa": {},
    "infllm_v2": {
        "attention.selector": "infllm_v2", "attention.mean_weight_frac": 1.0, "attention.block_tokens": 16,
        "attention.init_tokens": 16, "attention.local_tokens": 16,
    },
}  # fmt: skip


class Counted:
    """Products of queries with keys and pooled keys, counted where the reference makes them."""

    def __init__(self, monkeypatch, head_dim, num_heads):
        self.trained = self.selection = 0
        self.head_dim, self.num_heads, self.monkeypatch = head_dim, num_heads, monkeypatch
        self._spy(reference, "_allowed_keys", self._attended)
        self._spy(reference, "_block_scores", self._scored)
        self._spy(reference, "pool", self._pooled)
        self._spy(selectors, "_window_scores", self._window_scored)
        self._spy(selectors, "windows", self._windows)
        self._spy(dense_attention, "scaled_dot_product_attention", self._dense)

    def _spy(self, module, name, see):
        original = getattr(module, name)

        def spied(*args, **kwargs):
            out = original(*args, **kwargs)
            see(out, *args, **kwargs)
            return out

        self.monkeypatch.setattr(module, name, spied)

    def _pairs(self, pairs):
        # Scores and weighted sum, forward; the two factors of each of them, backward.
        self.trained += 6 * 2 * self.head_dim * pairs

    def _attended(self, allowed, *_, **__):
        self._pairs(int(allowed.sum()) * self.num_heads // len(allowed))

    def _dense(self, out, query, *_, **__):
        length = query.shape[-2]
        self._pairs(int(torch.ones(length, length).tril().sum()) * query.shape[1])

    def _scored(self, out, q, keys, current, *_):
        before = torch.arange(len(keys)) < current[:, None]
        self.selection += 2 * self.head_dim * q.shape[1] * int(before.sum())

    def _pooled(self, out, k, weights, cu_seqlens, *, block_tokens, kind):
        blocks = sum(int(n) // block_tokens for n in cu_seqlens.diff())
        self.selection += 2 * blocks * block_tokens * k.shape[1] * k.shape[2]

    def _window_scored(self, scores, *_):
        self.selection += 2 * self.head_dim * int(scores.isfinite().sum())

    def _windows(self, out, keys, window_tokens, stride_tokens):
        self.selection += 2 * len(out) * window_tokens * keys.shape[1] * keys.shape[2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_counted_flops_equal_the_formula(tiny_config, open_groups, monkeypatch, shape, attention):
    config = tiny_config(**SHAPES[shape], **ATTENTIONS[attention])
    parts = build_parts(config, open_groups(config))
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    batch = BatchReader(config, "train", tokenizer).micro_batch(0, 2)
    step = ForwardStep.of_step(config, punctuation_table(config, tokenizer, parts.groups), parts.groups, 1)
    counted = Counted(monkeypatch, config.model.head_dim, config.model.num_query_heads)
    with FlopCounterMode(display=False) as products:
        forward_backward(parts, [batch], step, forward_only=False)
    # Products with weights are `mm`; attention's are `bmm`, over whole tiles that a mask cuts, so that only
    # what the mask lets through counts.
    by_kind = products.get_flop_counts()["Global"]
    linear = by_kind[torch.ops.aten.mm] + by_kind.get(torch.ops.aten.addmm, 0)
    formula = DocumentFlops(config, parts.derived.parameters).of_step(batch.document_tokens, 1)

    assert sum(batch.document_tokens) == batch.tokens.numel()
    assert len(batch.document_tokens) > 2, "packed"
    assert formula.selected == linear + counted.trained + counted.selection
    assert (counted.selection > 0) == (attention != "dense")
    # A packed sequence taken for one document would have claimed more: the count above can fail.
    whole = DocumentFlops(config, parts.derived.parameters).of_step([config.data.seq_len_tokens] * 2, 1)
    assert formula.dense < whole.dense and formula.selected < whole.selected
    assert formula.selected == formula.dense if attention == "dense" else formula.selected < whole.dense


def test_padding_is_not_counted(tiny_config):
    config = tiny_config(**{"data.max_documents_per_sequence": 2})
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    batch = BatchReader(config, "train", tokenizer).micro_batch(0, 4)
    assert batch.num_overflow_tokens > 0
    assert sum(batch.document_tokens) == batch.tokens.numel() - batch.num_overflow_tokens
    joined = tiny_config(**{"data.isolate_documents": False})
    assert BatchReader(joined, "train", tokenizer).micro_batch(0, 4).document_tokens == [64] * 4


def test_k_of_each_step_and_layer_is_counted(tiny_config, open_groups):
    from phsa_megatron.config import flops
    from phsa_megatron.config.derive import derive

    config = tiny_config(
        **{
            "attention.topk_schedule": "random_layer",
            "attention.topk_choices": [1, 3],
            "attention.topk_dense_steps": 1,
            "attention.dense_layers": [1],
        }  # fmt: skip
    )
    parameters = derive(config).parameters
    count = DocumentFlops(config, parameters)
    dense_step = count.of_step([64], 1)
    assert dense_step.selected == dense_step.dense
    linear = 3 * flops.linear_flops(64, parameters)
    causal = flops.dense_layer_train_flops(64, config.model)
    own = {k: flops.layer_train_flops(64, config.model, config.attention, k) for k in (1, 3)}
    found = {count.of_step([64], step).selected for step in range(2, 30)}
    assert found == {linear + causal + own[k] for k in (1, 3)}
