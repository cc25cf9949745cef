"""Blocks of two vectors by the kernels: pooled halves, and the larger of a query's products with them.

As in `test_triton.py`: on a GPU the kernels, on a CPU the same code in Triton's interpreter.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from phsa_kernels import api, ops
from phsa_kernels.testing import Shape, random_inputs
from phsa_kernels.testing_selection import compare_selection
from tests.kernels.test_triton import DEVICE, DTYPES, LONGER, SHAPES

pytestmark = pytest.mark.usefixtures("poisoned_allocations")
NAMES = [
    "ragged and empty documents", "below a block", "no init", "three heads a group", "sixteen heads a group",
    "raw sum", "k above candidates", "block 64", "head dim 64",
]  # fmt: skip
SOME = [*(SHAPES[name] for name in NAMES), *LONGER]
IDS = [*NAMES, *map(str, LONGER)]


def pool_halves(shape, k, weights, impl):
    cu_seqlens = shape.cu_seqlens(k.device)
    options = {"block_tokens": shape.block_tokens, "kind": "halves", "impl": impl}
    return api.pool(k.detach(), weights, cu_seqlens, **options)


def select(shape, q, pooled, impl, score="max_of_two", softmax_scale=None):
    cu_seqlens = shape.cu_seqlens(q.device)
    where = (
        *api.token_positions(cu_seqlens, shape.num_tokens),
        api.block_boundaries(cu_seqlens, shape.block_tokens),
    )
    options = {"topk": shape.topk, "group_score": shape.group_score, "score": score, "impl": impl}
    options["softmax_scale"] = softmax_scale
    return api.select(q.detach(), pooled, *where, **shape.windows(), **options)


@pytest.mark.parametrize("shape", SOME, ids=IDS)
def test_pooled_halves_equal_the_reference(shape):
    _, k, _, weights, _, _ = random_inputs(shape, torch.float16, DEVICE, seed=0)
    # Some halves without any weight, and weights by head.
    sparse = weights * (torch.arange(shape.num_tokens, device=DEVICE) % 24 < 5)
    per_head = sparse[:, None] * torch.linspace(1.0, 0.5, shape.heads_kv, device=DEVICE)
    for w in (None, weights, sparse, per_head):
        mine, theirs = (pool_halves(shape, k, w, impl) for impl in ("triton", "reference"))
        assert (
            mine.shape
            == theirs.shape
            == (shape.num_tokens // shape.block_tokens, shape.heads_kv, 2, k.shape[2])
        )
        # fp32 sums of up to 32 products in another order, then one rounding to fp16.
        torch.testing.assert_close(mine, theirs, rtol=2.0**-10, atol=2.0**-18 * float(k.detach().abs().max()))
        assert torch.isfinite(mine).all()


def test_a_half_is_pooled_by_its_own_tokens():
    """By hand: two blocks of four tokens, one channel; the second half of the second block has no weight."""
    k = torch.tensor([1.0, 3.0, 5.0, 9.0, 2.0, 4.0, 6.0, 10.0], device=DEVICE).view(8, 1, 1)
    weights = torch.tensor([1.0, 1.0, 0.25, 0.75, 0.5, 0.0, 0.0, 0.0], device=DEVICE)
    bounds = torch.tensor([0, 8], dtype=torch.int32, device=DEVICE)
    pooled = api.pool(k, weights, bounds, block_tokens=4, kind="halves")
    assert pooled.flatten().tolist() == [2.0, 8.0, 2.0, 8.0]


@pytest.mark.parametrize("shape", SOME, ids=IDS)
def test_selection_is_the_references_on_exact_scores(shape):
    """Small integers, means of powers of two and such a scale: products are exact, and so is every tie."""
    q, k, *_ = random_inputs(shape, torch.float32, DEVICE, seed=3)
    q, k = (x.detach().mul(2).round() for x in (q, k))
    exact = dataclasses.replace(shape, group_score="raw_sum", topk=min(shape.topk, 3))
    pooled = pool_halves(exact, k, None, "triton")
    assert torch.equal(pooled, pool_halves(exact, k, None, "reference"))
    both = (select(exact, q, pooled, impl, softmax_scale=2.0**-3) for impl in ("triton", "reference"))
    assert torch.equal(*both)


@pytest.mark.parametrize("group_score", ["raw_sum", "softmax_sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SOME, ids=IDS)
def test_selection_differs_from_fp64_only_where_scores_are_closer_than_their_error(shape, dtype, group_score):
    shape = dataclasses.replace(shape, group_score=group_score)
    q, k, _, weights, _, _ = random_inputs(shape, dtype, DEVICE, seed=4)
    pooled = pool_halves(shape, k, weights, "triton")
    found = compare_selection(shape, q.detach(), pooled, select(shape, q, pooled, "triton"))
    assert found.within, found


@pytest.mark.parametrize("topk", [2, 3])
def test_one_of_the_two_vectors_alone_is_seen_to_be_wrong(topk):
    """The control, for both kernels: by columns up to k = 2, by a list above."""
    shape = Shape((400,), 4, 2, 16, topk, 16, 32)
    q, k, *_ = random_inputs(shape, torch.float32, DEVICE, seed=5)
    pooled = pool_halves(shape, k, None, "triton")
    for one in (0, 1):
        ids = select(shape, q, pooled[:, :, one : one + 1].contiguous(), "triton", score="dot")
        assert compare_selection(shape, q.detach(), pooled, ids).wrong_rows > 100
    assert compare_selection(shape, q.detach(), pooled, select(shape, q, pooled, "triton")).within


def test_ties_go_to_the_lower_block():
    shape = Shape((16 * 16,), 2, 1, 16, 3, 32, 16)
    q, k, *_ = random_inputs(shape, torch.float32, DEVICE, seed=0)
    k = k.detach()[48:64].repeat(16, 1, 1)
    for group_score in ("raw_sum", "softmax_sum"):
        same = dataclasses.replace(shape, group_score=group_score)
        assert select(same, q, pool_halves(same, k, None, "triton"), "triton")[-1, 0].tolist() == [2, 3, 4]


def test_operators_keep_their_word():
    shape = SHAPES["ragged and empty documents"]
    q, k, _, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=1)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    torch.library.opcheck(ops.pool, (k.detach(), weights, cu_seqlens, 16, 2))
    pooled = ops.pool(k.detach(), weights, cu_seqlens, 16, 2)
    where = *api.token_positions(cu_seqlens, shape.num_tokens), api.block_boundaries(cu_seqlens, 16)
    torch.library.opcheck(ops.select, (q.detach(), pooled, *where, 2, 16, 16, 16, True, 0.25))


def test_vectors_and_scores_that_do_not_fit_are_refused():
    shape = SHAPES["one token"]
    q, k, *_ = random_inputs(shape, torch.float32, DEVICE, seed=1)
    pooled = torch.zeros(0, 1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="score='dot' is of 1 vectors a block, pooled has 2"):
        select(shape, q, pooled, "triton", score="dot")
    with pytest.raises(ValueError, match="score='max_of_two' is of 2 vectors a block, pooled has 1"):
        select(shape, q, pooled[:, :, :1], "triton")
    with pytest.raises(NotImplementedError, match="score='minmax': .* supports scores dot, max_of_two"):
        select(shape, q, pooled, "triton", score="minmax")
    with pytest.raises(ValueError, match="block_tokens=5"):
        api.pool(k.detach(), None, shape.cu_seqlens(DEVICE), block_tokens=5, kind="halves")
