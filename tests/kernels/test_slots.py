"""Keys in slots (`block_slot`): the Triton kernels against the fp64 reference in natural order.

Every row of k and v that no key owns is NaN: rows of slots that nobody names, and the rest of a last block.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from phsa_kernels import api, configs, ops
from phsa_kernels.testing import Shape, compare_with_truth, random_inputs

pytestmark = pytest.mark.usefixtures("poisoned_allocations")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES = {
    "one token": Shape((1,), 2, 1, 16, 1, 16, 16),
    "exact multiple": Shape((128,), 2, 1, 16, 2, 16, 16),
    "ragged and empty documents": Shape((70, 1, 0, 15, 97, 0), 4, 2, 16, 2, 16, 32),
    "three heads a group": Shape((110, 33), 3, 1, 16, 2, 16, 16),
    "one head a group, no init": Shape((110,), 2, 2, 16, 1, 0, 16),
    "block 32": Shape((140, 75), 2, 1, 16, 1, 32, 32, block_tokens=32),
    "block 64": Shape((270, 30), 4, 1, 16, 1, 64, 64, block_tokens=64),
    "dense short documents": Shape((60, 120, 61), 2, 1, 16, 1, 16, 16, dense_len_tokens=61),
}


def slot_table(shape, seed=0, gaps=3):
    """Return (block_slot with two unused entries, the row of every key), slots in random order with gaps."""
    m = shape.block_tokens
    blocks = [-(-length // m) for length in shape.lengths]
    order = torch.randperm(sum(blocks) + gaps, generator=torch.Generator().manual_seed(seed))
    rows, first = [], 0
    for length, count in zip(shape.lengths, blocks, strict=True):
        token = torch.arange(length)
        rows.append(order[first + token // m] * m + token % m)
        first += count
    table = torch.cat([order[: sum(blocks)], torch.tensor([-1, -1])])
    return table.to(DEVICE, torch.int32), torch.cat(rows).to(DEVICE), len(order) * m


def in_slots(x, rows, num_rows):
    """Return x at its rows among NaN, as a leaf."""
    out = x.new_full((num_rows, *x.shape[1:]), torch.nan)
    out[rows] = x.detach()
    return out.requires_grad_()


def some_ids(shape):
    """Return every query's ascending candidates, thinned by its position: as `select` would pick."""
    q, k, *_ = random_inputs(shape, torch.float32, DEVICE, seed=11)
    cu_seqlens, m = shape.cu_seqlens(DEVICE), shape.block_tokens
    pooled = api.pool(k.detach(), None, cu_seqlens, block_tokens=m)
    return api.select(
        q.detach(), pooled, *api.token_positions(cu_seqlens, shape.num_tokens),
        api.block_boundaries(cu_seqlens, m), topk=shape.topk, **shape.windows(),
    )  # fmt: skip


def run(impl, shape, q, k, v, ids, table, upstream):
    cu_seqlens = shape.cu_seqlens(DEVICE)
    out, lse = api.attend(
        q, k, v, ids, *api.token_positions(cu_seqlens, shape.num_tokens), cu_seqlens, table,
        **shape.windows(), dense_len_tokens=shape.dense_len_tokens, impl=impl,
    )  # fmt: skip
    return [out, lse, *torch.autograd.grad([out, lse], [q, k, v], upstream)]


def through_slots(shape, dtype, table_of=lambda table: table):
    """Return the comparisons with natural order's truth, and the gradients of the rows that no key owns."""
    *qkv, _, grad_out, grad_lse = random_inputs(shape, dtype, DEVICE, seed=1)
    ids = some_ids(shape)
    table, rows, num_rows = slot_table(shape)
    k, v = (in_slots(x, rows, num_rows) for x in qkv[1:])
    out, lse, dq, dk, dv = run(
        "triton", shape, qkv[0], k, v, ids, table_of(table), [grad_out.to(dtype), grad_lse]
    )
    others = torch.ones(num_rows, dtype=torch.bool, device=DEVICE)
    others[rows] = False
    kernel = [out, lse, dq, dk[rows], dv[rows]]
    return compare_with_truth(shape, qkv, ids, grad_out, grad_lse, kernel), (dk[others], dv[others])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_slots_are_within_the_error_budget_of_natural_order(shape):
    found, unowned = through_slots(shape, torch.float32)
    for comparison in found:
        assert comparison.within, comparison
    assert all(bool((x == 0).all()) for x in unowned)


def test_slots_in_low_precision():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    found, unowned = through_slots(SHAPES["ragged and empty documents"], dtype)
    assert all(comparison.within for comparison in found), found
    assert all(bool((x == 0).all()) for x in unowned)


def test_a_wrong_table_is_noticed():
    """Negative control: two blocks exchanged, and nothing but lse could still be right."""
    shape = SHAPES["exact multiple"]

    def exchanged(table):
        return table[[1, 0, *range(2, len(table))]]

    found, _ = through_slots(shape, torch.float32, exchanged)
    assert not any(comparison.within for comparison in found), found


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_blocks_that_no_query_sees_need_no_slot(impl):
    """A suffix's queries: blocks between init and local that nobody chose are -1, in both implementations."""
    shape = Shape((160,), 2, 1, 16, 1, 16, 32)
    *qkv, _, grad_out, grad_lse = random_inputs(shape, torch.float32, DEVICE, seed=2)
    table, rows, num_rows = slot_table(shape)
    cu_seqlens = shape.cu_seqlens(DEVICE)
    q_pos, q_doc = (x[150:] for x in api.token_positions(cu_seqlens, 160))
    ids = torch.full((10, 1, 1), 4, dtype=torch.int32, device=DEVICE)
    absent = [1, 2, 3, 5, 6, 7]
    missing = table.clone()
    missing[absent] = -1
    taken = torch.isin(torch.arange(160, device=DEVICE) // 16, torch.tensor(absent, device=DEVICE))

    def attend(impl, k, v, slots):
        q = qkv[0].detach()[150:].clone().requires_grad_()
        out, lse = api.attend(q, k, v, ids, q_pos, q_doc, cu_seqlens, slots, **shape.windows(), impl=impl)
        return [out, lse, *torch.autograd.grad([out, lse], [q, k, v], [grad_out[150:], grad_lse[150:]])]

    k, v = (in_slots(x.detach()[~taken], rows[~taken], num_rows) for x in qkv[1:])
    mine, theirs = attend(impl, k, v, missing), attend("reference", *qkv[1:], None)
    mine[3], mine[4] = mine[3][rows], mine[4][rows]
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion on the device ends the process's context")
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda table: table[:5], "fewer entries than blocks"),
        (lambda table: table + 8, "rows are not in k"),
        (lambda table: table.clone().index_fill_(0, torch.tensor([2, 3]), 0), "names a slot twice"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(broken, message):
    with pytest.raises(RuntimeError, match=message):
        through_slots(SHAPES["exact multiple"], torch.float32, broken)


def test_the_operator_with_slots_passes_opcheck():
    shape = Shape((60, 37), 2, 1, 16, 2, 16, 16)
    q, k, v, *_ = random_inputs(shape, torch.float32, DEVICE, seed=0)
    table, rows, num_rows = slot_table(shape)
    k, v = (in_slots(x, rows, num_rows) for x in (k, v))
    cu_seqlens = shape.cu_seqlens(DEVICE)
    positions = api.token_positions(cu_seqlens, shape.num_tokens)
    k, v = (x.detach().nan_to_num().requires_grad_() for x in (k, v))  # opcheck compares gradients itself
    torch.library.opcheck(
        ops.attend, (q, k, v, some_ids(shape), *positions, cu_seqlens, 16, 16, 16, 0, 0.25, table)
    )


def test_init_gradients_in_chunks(monkeypatch):
    """Chunks of 32 rows: the partial sums of init keys, which a short document does not need otherwise."""
    table = dataclasses.replace(configs.SAFE, init_chunk_rows=32)
    monkeypatch.setattr("phsa_kernels.attend.launch.configs_for", lambda device, dtype: table)
    found, _ = through_slots(Shape((40, 100), 2, 1, 16, 1, 48, 16), torch.float32)
    assert all(comparison.within for comparison in found), found
