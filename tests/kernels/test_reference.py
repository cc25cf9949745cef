"""The reference against plain loops in fp64 (`phsa_oracle`), and the properties the method promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phsa_cases import SETTING, Case, M
from phsa_oracle import Setting, as_lists, punctuation_weights

from phsa_kernels import api


def assert_same_as_oracle(case, setting, gradients=True):
    for tensor in (case.q, case.k, case.v):
        tensor.requires_grad_(gradients)
    out, lse, chosen = case.oracle(setting)
    got = case.run(setting)
    assert as_lists(got.ids) == chosen
    torch.testing.assert_close(got.out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.lse, lse.float(), rtol=1e-6, atol=1e-6)
    if gradients:
        upstream = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        for mine, theirs in zip(
            case.gradients(got.out, upstream), case.gradients(out, upstream), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


LAYOUTS = {
    "one token": [1],
    "below a block": [M - 1],
    "exactly a block": [M],
    "exact multiple": [8 * M],
    "ragged tails": [23, 30],
    "short and long": [1, 2, 37, 1, M, 19],
    "empty documents": [0, 25, 0, 0, 27, 0],
}


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_plain_loops_for_every_layout(lengths):
    assert_same_as_oracle(Case(lengths), SETTING)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (3, 1), (4, 1), (16, 1)])
@pytest.mark.parametrize("group_score", ["softmax_sum", "raw_sum"])
def test_equals_plain_loops_for_every_group_size(heads, group_score):
    setting = Setting(2, M, 2 * M, M, group_score)
    assert_same_as_oracle(Case([34, 9], heads=heads, head_dim=3), setting)


@pytest.mark.parametrize("punctuation", ["none", "all"])
def test_equals_plain_loops_without_and_with_only_punctuation(punctuation):
    assert_same_as_oracle(Case([33, 14], punctuation=punctuation), SETTING)


@pytest.mark.parametrize(
    "setting",
    [
        Setting(2, 0, M, M),
        Setting(1, 2 * M, M, M),
        Setting(50, M, M, M),
        Setting(3, 0, 3 * M, M, "raw_sum"),
        Setting(2, M, M, M, dense_len_tokens=20),
        Setting(4, 2, 2, 2),
        Setting(2, 1, 1, 1),
    ],
    ids=["no init", "k = 1", "k above candidates", "raw sum", "dense short documents", "block 2", "block 1"],
)
def test_equals_plain_loops_for_every_setting(setting):
    assert_same_as_oracle(Case([41, 13, 20], m=setting.block_tokens), setting)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 22), min_size=1, max_size=5).filter(lambda x: sum(x) > 0),
    group=st.integers(1, 4),
    topk=st.integers(1, 4),
    init=st.integers(0, 2),
    local=st.integers(1, 2),
    group_score=st.sampled_from(["softmax_sum", "raw_sum"]),
    dense_len=st.sampled_from([0, 10]),
    seed=st.integers(0, 99),
)
def test_equals_plain_loops_for_random_layouts(
    lengths, group, topk, init, local, group_score, dense_len, seed
):
    setting = Setting(topk, init * 2, local * 2, 2, group_score, dense_len)
    assert_same_as_oracle(
        Case(lengths, heads=(group, 1), head_dim=2, seed=seed, m=2), setting, gradients=False
    )


def test_gradients_pass_gradcheck():
    case = Case([11, 6], heads=(2, 1), head_dim=2)
    ids = case.run().ids
    positions = case.positions()

    def attend(q, k, v):
        return api.attend(q, k, v, ids, *positions, case.cu_seqlens, **SETTING.attend_kwargs())[0]

    inputs = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=False)


def test_lse_has_the_gradient_of_a_log_sum_exp():
    case = Case([13], heads=(1, 1), head_dim=2)
    case.q.requires_grad_()
    setting = Setting(1, 0, 13 // M * M + M, M)  # local covers the document: plain causal attention
    (got,) = torch.autograd.grad(case.run(setting).lse.sum(), case.q)
    scores = torch.einsum("qhd,khd->qk", case.q, case.k) / math.sqrt(2)
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    (expected,) = torch.autograd.grad(scores.logsumexp(-1).sum(), case.q)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_selection_and_pooling_pass_no_gradient():
    case = Case([40])
    weights = case.weights.requires_grad_()
    case.q.requires_grad_()
    out = case.run(weights=weights)
    assert not out.ids.requires_grad
    assert torch.autograd.grad(out.out.sum(), weights, allow_unused=True) == (None,)


def test_ties_go_to_the_lower_block():
    """Integers, so that every matrix product is exact whatever order it is summed in."""
    case = Case([16 * M], punctuation="none")
    case.q, case.k = case.q.mul(3).round(), case.k.mul(3).round()
    blocks = case.k.view(16, M, 1, 4)
    blocks[:] = blocks[3].clone()  # every block is the same block
    ids = case.run(Setting(3, 2 * M, M, M)).ids
    assert ids[-1, 0].tolist() == [2, 3, 4]
    assert as_lists(ids) == case.oracle(Setting(3, 2 * M, M, M))[2]


def test_tie_at_the_kth_place_keeps_the_better_blocks():
    """Scores 1 5 5 3 5 for k = 2: the two lowest of the three equal best."""
    q = torch.ones(1, 1, 1, dtype=torch.float64)
    pooled = torch.tensor([1.0, 5, 5, 3, 5, 0], dtype=torch.float64).view(6, 1, 1, 1)
    position, doc = torch.tensor([5 * M], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cu_blocks = torch.tensor([0, 6], dtype=torch.int32)
    chosen = {
        k: api.select(q, pooled, position, doc, cu_blocks, topk=k, init_tokens=0, local_tokens=M,
                      block_tokens=M, group_score="raw_sum")[0, 0].tolist()
        for k in (1, 2, 3, 4, 7)
    }  # fmt: skip
    assert chosen == {1: [1], 2: [1, 2], 3: [1, 2, 4], 4: [1, 2, 3, 4], 7: [0, 1, 2, 3, 4, -1, -1]}


def test_candidates_whose_softmax_underflows_are_still_candidates():
    q = torch.full((1, 1, 1), 1.0)
    pooled = torch.tensor([-2000.0, 0, -3000]).view(3, 1, 1, 1)
    position, doc = torch.tensor([3 * M], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    ids = api.select(q, pooled, position, doc, torch.tensor([0, 3], dtype=torch.int32), topk=4, init_tokens=0,
                     local_tokens=M, block_tokens=M)  # fmt: skip
    assert ids.tolist() == [[[0, 1, 2, -1]]]


def test_a_future_token_changes_nothing_earlier():
    lengths = [37, 21]
    base, changed = Case(lengths), Case(lengths)
    cut = 26
    for tensor in (changed.q, changed.k, changed.v):
        tensor[cut:37] = torch.randn_like(tensor[cut:37])
        tensor[37 + 10 :] = torch.randn_like(tensor[37 + 10 :])
    changed.marks[cut:37] = [not mark for mark in changed.marks[cut:37]]
    # A weight depends on later marks of its own block, which may not be scored before the block is complete.
    first, second = base.run(), changed.run()
    earlier = [*range(cut), *range(37, 37 + 10)]
    assert torch.equal(first.out[earlier], second.out[earlier])
    assert torch.equal(first.lse[earlier], second.lse[earlier])
    assert torch.equal(first.ids[earlier], second.ids[earlier])
    assert not torch.equal(first.out[cut:37], second.out[cut:37])


def test_lambda_one_is_the_plain_mean():
    case = Case([45, 18])
    lam_one = punctuation_weights(case.marks, case.lengths, M, lam=1.0)
    with_weights, without = (api.pool(case.k, w, case.cu_seqlens, block_tokens=M) for w in (lam_one, None))
    torch.testing.assert_close(with_weights, without, rtol=1e-14, atol=1e-14)
    means = [case.k[s : s + M].mean(0) for s in [*range(0, 44, M), *range(45, 45 + 16, M)]]
    torch.testing.assert_close(without[: len(means), :, 0], torch.stack(means))
    assert torch.equal(case.run(weights=lam_one).ids, case.run(weights=None).ids)
    assert not torch.equal(case.run().ids, case.run(weights=None).ids)


def test_weights_may_differ_by_head():
    case = Case([24], heads=(2, 2))
    per_head = torch.stack([case.weights, torch.full_like(case.weights, 1 / M)], 1)
    pooled = api.pool(case.k, per_head, case.cu_seqlens, block_tokens=M)
    shared = api.pool(case.k, case.weights, case.cu_seqlens, block_tokens=M)
    mean = api.pool(case.k, None, case.cu_seqlens, block_tokens=M)
    torch.testing.assert_close(pooled[:, 0], shared[:, 0])
    torch.testing.assert_close(pooled[:, 1], mean[:, 1])


def test_pooled_rows_past_the_last_block_are_zero():
    case = Case([7, 7, 7])  # 21 tokens: 5 rows, but one complete block in each document
    pooled = api.pool(case.k, case.weights, case.cu_seqlens, block_tokens=M)
    assert pooled.shape == (5, 1, 1, 4)
    assert api.block_boundaries(case.cu_seqlens, M).tolist() == [0, 1, 2, 3]
    assert (pooled[:3] != 0).all()
    assert (pooled[3:] == 0).all()


def test_pooling_rounds_once_to_the_dtype_of_the_keys():
    case = Case([32])
    low = case.k.bfloat16()
    pooled = api.pool(low, case.weights.float(), case.cu_seqlens, block_tokens=M)
    exact = api.pool(low.double(), case.weights, case.cu_seqlens, block_tokens=M)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, exact.bfloat16())
