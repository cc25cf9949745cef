"""The Triton kernels against the reference: on the GPU if there is one, else in Triton's interpreter.

Selection is compared with the reference's own ids; outputs and gradients are compared for the kernel's ids,
within a budget that eager PyTorch's own error sets (`phsa_kernels.testing`). Every allocation is filled with
NaN first, so that an element nothing wrote cannot pass.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from phsa_kernels import api, configs, ops
from phsa_kernels.testing import (
    Shape,
    attend_and_gradients,
    compare_with_truth,
    queries_per_distinct_block,
    random_inputs,
)
from phsa_kernels.testing_selection import compare_selection

pytestmark = pytest.mark.usefixtures("poisoned_allocations")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bf16 is not the GPU's; fp16 and fp32 run the same code there.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])

SHAPES = {
    "one token": Shape((1,), 2, 1, 16, 2, 16, 32),
    "below a block": Shape((15,), 2, 1, 16, 2, 16, 32),
    "exact multiple": Shape((128,), 2, 1, 16, 2, 16, 16),
    "ragged and empty documents": Shape((70, 1, 0, 15, 97, 0), 4, 2, 16, 2, 16, 32),
    "no init": Shape((130,), 2, 1, 16, 2, 0, 32),
    "three heads a group": Shape((110, 33), 3, 1, 16, 2, 16, 16),
    "one head a group": Shape((110,), 2, 2, 16, 1, 16, 16),
    "sixteen heads a group": Shape((90,), 16, 1, 16, 2, 16, 16),
    "raw sum": Shape((150,), 4, 2, 16, 3, 16, 16, group_score="raw_sum"),
    "k above candidates": Shape((90,), 16, 2, 16, 7, 16, 16),
    "block 32": Shape((140,), 4, 1, 16, 1, 32, 32, block_tokens=32),
    "block 64": Shape((270,), 4, 1, 16, 1, 64, 64, block_tokens=64),
    "dense short documents": Shape((60, 120, 61), 2, 1, 16, 1, 16, 16, dense_len_tokens=61),
    "whole steps of init": Shape((330, 200), 2, 1, 16, 2, 64, 128),
    "window shorter than a tile": Shape((200,), 1, 1, 16, 2, 64, 16),
    "head dim 64": Shape((100,), 2, 1, 64, 2, 16, 16),
}

# Too slow for the interpreter.
LONGER = (
    [
        Shape((4096,), 16, 8, 128, 2, 16, 128),
        Shape((1500, 6000, 31), 16, 8, 128, 16, 16, 128),
        Shape((8192,), 32, 8, 128, 4, 16, 128),
        Shape((2500,), 16, 1, 128, 2, 16, 128),
        Shape((1900,), 2, 1, 64, 64, 16, 128),
        Shape((1700, 900), 12, 4, 128, 1, 128, 512),
        Shape((3000,), 32, 2, 128, 16, 64, 512, block_tokens=64),
    ]
    if torch.cuda.is_available()
    else []
)


@pytest.fixture
def short_init_chunks(monkeypatch):
    """Chunks of 32 rows, so that a short document already needs the partial sums of init gradients."""
    table = dataclasses.replace(configs.SAFE, init_chunk_rows=32)
    monkeypatch.setattr("phsa_kernels.attend.launch.configs_for", lambda device, dtype: table)


def select_ids(shape, qkv, weights, impl):
    q, k, _ = (x.detach() for x in qkv)
    cu_seqlens = shape.cu_seqlens(q.device)
    pooled = api.pool(k, weights, cu_seqlens, block_tokens=shape.block_tokens, impl=impl)
    return api.select(
        q,
        pooled,
        *api.token_positions(cu_seqlens, shape.num_tokens),
        api.block_boundaries(cu_seqlens, shape.block_tokens),
        topk=shape.topk,
        **shape.windows(),
        group_score=shape.group_score,
        impl=impl,
    )


def assert_within_budget(shape, dtype, seed=0):
    *qkv, weights, grad_out, grad_lse = random_inputs(shape, dtype, DEVICE, seed)
    ids = select_ids(shape, qkv, weights, "triton")
    kernel = attend_and_gradients("triton", shape, qkv, ids, grad_out, grad_lse)
    for found in compare_with_truth(shape, qkv, ids, grad_out, grad_lse, kernel):
        assert found.within, found
    if DEVICE == "cuda":  # the interpreter runs programs one after another: nothing could differ
        again = attend_and_gradients("triton", shape, qkv, ids, grad_out, grad_lse)
        assert all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_are_within_the_error_budget(shape):
    assert_within_budget(shape, torch.float32)


@pytest.mark.parametrize("name", ["sixteen heads a group", "block 64"])
def test_the_small_tiles_of_full_precision(name, monkeypatch):
    for room in ("attend", "select"):
        monkeypatch.setattr(
            f"phsa_kernels.{room}.launch.configs_for", lambda device, dtype: configs.FULL_PRECISION
        )
    assert_within_budget(SHAPES[name], torch.float32)
    assert_selection_is_exact(SHAPES[name])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_within_the_error_budget(dtype):
    assert_within_budget(SHAPES["ragged and empty documents"], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LONGER, ids=map(str, LONGER))
def test_full_head_shapes_are_within_the_error_budget(shape, dtype):
    assert_within_budget(shape, dtype)


@pytest.mark.parametrize("lengths", [(150,), (40, 100, 5, 60), (31, 1, 33, 128)])
def test_init_gradients_are_summed_over_chunks(lengths, short_init_chunks):
    assert_within_budget(Shape(lengths, 2, 1, 16, 1, 48, 16), torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_selection_is_the_references_on_exact_scores(shape):
    assert_selection_is_exact(shape)


def assert_selection_is_exact(shape):
    """Small integers: every dot product is exact, so the chosen sets must be the same, ties included."""
    *qkv, _, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=3)
    q, k, v = (x.detach().mul(2).round() for x in qkv)
    k = k - k.remainder(2)
    exact = dataclasses.replace(shape, group_score="raw_sum", topk=min(shape.topk, 3))
    ones = torch.full((shape.num_tokens,), 1.0, device=DEVICE)
    mine, theirs = (select_ids(exact, (q, k, v), ones, impl) for impl in ("triton", "reference"))
    assert torch.equal(mine, theirs)
    # Exponentials round, and scores of this size are full of near ties: no row beyond them.
    exact = dataclasses.replace(exact, group_score="softmax_sum")
    assert selection_found(exact, (q, k, v), ones).wrong_rows == 0


def selection_found(shape, qkv, weights, ids=None):
    q, k, _ = (x.detach() for x in qkv)
    pooled = api.pool(k, weights, shape.cu_seqlens(DEVICE), block_tokens=shape.block_tokens, impl="triton")
    return compare_selection(
        shape, q, pooled, select_ids(shape, qkv, weights, "triton") if ids is None else ids
    )


@pytest.mark.parametrize("group_score", ["raw_sum", "softmax_sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LONGER], ids=[*SHAPES.keys(), *map(str, LONGER)])
def test_selection_differs_from_fp64_only_where_scores_are_closer_than_their_error(shape, dtype, group_score):
    shape = dataclasses.replace(shape, group_score=group_score)
    *qkv, weights, _, _ = random_inputs(shape, dtype, DEVICE, seed=4)
    found = selection_found(shape, qkv, weights)
    print(found)
    assert found.within, found


def test_the_selection_rule_sees_wrong_choices():
    """Negative controls: a neighbour, the other rule's blocks, one missing, one repeated, a lost order."""
    shape = dataclasses.replace(SHAPES["raw sum"], lengths=(300,))
    *qkv, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=4)
    ids = select_ids(shape, qkv, weights, "triton")
    other = select_ids(dataclasses.replace(shape, group_score="softmax_sum"), qkv, weights, "triton")
    late = ids[-100:]
    missing, repeated = late.clone(), late.clone()
    missing[..., -1], repeated[..., 1] = -1, late[..., 0]
    shifted = torch.where(late[..., -1:] < 16, late + 1, late)
    for wrong in (shifted, other[-100:], missing, repeated, late.flip(-1)):
        found = selection_found(shape, qkv, weights, torch.cat([ids[:-100], wrong]))
        assert found.wrong_rows > 10, found
    assert selection_found(shape, qkv, weights, ids).within


def test_ties_go_to_the_lower_block():
    shape = Shape((16 * 16,), 2, 1, 16, 3, 32, 16)
    *qkv, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=0)
    q, k, v = (x.detach() for x in qkv)
    k = k[48:64].repeat(16, 1, 1)
    for group_score in ("raw_sum", "softmax_sum"):
        ids = select_ids(dataclasses.replace(shape, group_score=group_score), (q, k, v), None, "triton")
        assert ids[-1, 0].tolist() == [2, 3, 4]


def test_pooling_equals_the_reference():
    shape = SHAPES["ragged and empty documents"]
    _, k, _, weights, _, _ = random_inputs(shape, torch.float16, DEVICE, seed=0)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    per_head = weights[:, None] * torch.tensor([1.0, 0.5], device=DEVICE)
    for w in (None, weights, per_head):
        mine, theirs = (api.pool(k.detach(), w, cu_seqlens, impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(mine, theirs, rtol=torch.finfo(torch.float16).eps, atol=1e-6)


def test_packed_documents_do_not_touch_each_other():
    shape = Shape((70, 45, 90), 2, 1, 16, 2, 16, 16)
    *qkv, weights, grad_out, grad_lse = random_inputs(shape, torch.float32, DEVICE, seed=5)
    ids = select_ids(shape, qkv, weights, "triton")
    packed = attend_and_gradients("triton", shape, qkv, ids, grad_out, grad_lse)
    start = 0
    for length in shape.lengths:
        rows, alone = slice(start, start + length), dataclasses.replace(shape, lengths=(length,))
        own = [x.detach()[rows].requires_grad_() for x in qkv]
        own_ids = select_ids(alone, own, weights[rows], "triton")
        assert torch.equal(own_ids, ids[rows])
        separate = attend_and_gradients("triton", alone, own, own_ids, grad_out[rows], grad_lse[rows])
        for mine, theirs in zip(packed, separate, strict=True):
            torch.testing.assert_close(mine[rows], theirs, rtol=1e-5, atol=1e-5)
        start += length


def test_a_future_token_changes_nothing_earlier():
    shape = Shape((150,), 2, 1, 16, 2, 16, 16)
    *qkv, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=6)
    base = api.phsa_attention(
        *qkv, weights, shape.cu_seqlens(DEVICE), topk=2, **shape.windows(), impl="triton"
    )
    changed = [x.detach().clone() for x in qkv]
    for x in changed:
        x[101:] = 7 * x[101:].flip(0)
    other = api.phsa_attention(
        *changed, weights, shape.cu_seqlens(DEVICE), topk=2, **shape.windows(), impl="triton"
    )
    for mine, theirs in zip(base, other, strict=True):
        assert torch.equal(mine[:101], theirs[:101])
    assert not torch.equal(base.out[101:], other.out[101:])


def test_queries_may_be_any_subset_in_any_order():
    shape = Shape((90, 66), 2, 1, 16, 2, 16, 16)
    *qkv, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=7)
    q, k, v = (x.detach() for x in qkv)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    q_pos, q_doc = api.token_positions(cu_seqlens, shape.num_tokens)
    rows = torch.randperm(shape.num_tokens, generator=torch.Generator().manual_seed(0))[:50].to(DEVICE)

    def run(impl):
        part, keys, values = (x.clone().requires_grad_() for x in (q[rows], k, v))
        out = api.phsa_attention(
            part, keys, values, weights, cu_seqlens, topk=2, **shape.windows(), q_pos=q_pos[rows],
            q_doc=q_doc[rows], impl=impl,
        )  # fmt: skip
        return [*out, *torch.autograd.grad(out.out.square().sum(), [part, keys, values])]

    for mine, theirs in zip(run("triton"), run("reference"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_windows_only_when_there_are_no_ids():
    shape = Shape((120,), 2, 1, 16, 1, 16, 32)
    *qkv, _, grad_out, grad_lse = random_inputs(shape, torch.float32, DEVICE, seed=8)
    ids = torch.zeros(120, 1, 0, dtype=torch.int32, device=DEVICE)
    kernel = attend_and_gradients("triton", shape, qkv, ids, grad_out, grad_lse)
    assert all(c.within for c in compare_with_truth(shape, qkv, ids, grad_out, grad_lse, kernel))


def test_the_budget_notices_ids_shifted_by_one():
    """Negative control: the reference's answer for ids one block off is out of budget everywhere."""
    shape = Shape((200,), 2, 1, 16, 2, 16, 16)
    *qkv, weights, grad_out, grad_lse = random_inputs(shape, torch.float32, DEVICE, seed=9)
    ids = select_ids(shape, qkv, weights, "triton")
    shifted = torch.where(ids > 1, ids - 1, ids)
    kernel = attend_and_gradients("triton", shape, qkv, shifted, grad_out, grad_lse)
    assert not any(c.within for c in compare_with_truth(shape, qkv, ids, grad_out, grad_lse, kernel))


def test_share_counts_queries_per_distinct_block():
    alike = torch.tensor([[4, 9]], dtype=torch.int32).expand(128, 1, 2)
    assert queries_per_distinct_block(alike) == 32
    distinct = torch.arange(256, dtype=torch.int32).view(128, 1, 2)
    assert queries_per_distinct_block(distinct) == 1


def test_operators_pass_opcheck():
    shape = Shape((60, 37), 2, 1, 16, 2, 16, 16)
    q, k, v, weights, _, _ = random_inputs(shape, torch.float32, DEVICE, seed=0)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    positions = api.token_positions(cu_seqlens, shape.num_tokens)
    torch.library.opcheck(ops.pool, (k.detach(), weights, cu_seqlens, 16))
    pooled = ops.pool(k.detach(), weights, cu_seqlens, 16)
    blocks = api.block_boundaries(cu_seqlens, 16)
    torch.library.opcheck(ops.select, (q.detach(), pooled, *positions, blocks, 2, 16, 16, 16, True, 0.25))
    ids = ops.select(q.detach(), pooled, *positions, blocks, 2, 16, 16, 16, True, 0.25)
    torch.library.opcheck(ops.attend, (q, k, v, ids, *positions, cu_seqlens, 16, 16, 16, 0, 0.25))


def refused(shape, **changes):
    *qkv, weights, _, _ = random_inputs(shape, changes.pop("dtype", torch.float32), DEVICE, seed=0)
    kwargs = {"topk": shape.topk, **shape.windows(), "impl": "triton"} | changes
    return api.phsa_attention(*qkv, weights, shape.cu_seqlens(DEVICE), **kwargs)


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (Shape((40,), 2, 1, 16, 2, 16, 16), {"dtype": torch.float64}, "torch.float64: .* supports torch.bf"),
        (Shape((40,), 2, 1, 24, 2, 16, 16), {}, "head dim 24: impl='triton' supports head dims"),
        (Shape((40,), 2, 1, 16, 2, 8, 8, block_tokens=8), {}, "block_tokens=8: .* supports block_tokens in"),
        (Shape((40,), 17, 1, 16, 2, 16, 16), {}, "17 query heads a key-value head: .* supports 1 to 16"),
        (Shape((40,), 2, 1, 16, 65, 16, 16), {}, "topk=65: .* supports topk up to 64"),
        (Shape((40,), 2, 1, 16, 2, 16, 16), {"kind": "moments"}, "kind='moments': .* supports kinds mean"),
        (Shape((40,), 2, 1, 16, 2, 16, 16), {"group_score": "per_head"}, "supports softmax_sum and raw_sum"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_serve_is_refused(shape, changes, message):
    with pytest.raises(NotImplementedError, match=message):
        refused(shape, **changes)


def test_ids_by_query_head_are_refused():
    shape = Shape((40,), 2, 1, 16, 1, 16, 16)
    q, k, v, *_ = random_inputs(shape, torch.float32, DEVICE, seed=0)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    args = (*api.token_positions(cu_seqlens, 40), cu_seqlens)
    ids = torch.zeros(40, 1, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="ids of 2 heads: .* by key-value head"):
        api.attend(q, k, v, ids.expand(-1, 2, -1), *args, **shape.windows(), impl="triton")
