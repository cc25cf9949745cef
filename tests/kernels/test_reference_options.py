"""What the reference promises about packing, windows, subsets of queries, slots and ids."""

import math

import pytest
import torch
from phsa_cases import SETTING, Case, M
from phsa_oracle import Setting, as_lists, boundaries

from phsa_kernels import api


def test_packed_equals_separate_documents():
    lengths = [29, 3, 40]
    case = Case(lengths)
    packed = case.run()
    weights, start = case.weights, 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = api.phsa_attention(
            case.q[rows], case.k[rows], case.v[rows], weights[rows], boundaries([length]), **SETTING.kwargs()
        )
        torch.testing.assert_close(packed.out[rows], alone.out, rtol=1e-13, atol=1e-13)
        assert torch.equal(packed.ids[rows], alone.ids)
        start += length


def test_padding_of_cu_seqlens_changes_nothing():
    case = Case([29, 11])
    padded = Case([29, 11, 0, 0, 0])
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(case, name), getattr(padded, name))
    for mine, theirs in zip(case.run(), padded.run(), strict=True):
        assert torch.equal(mine, theirs)


def test_windows_that_cover_everything_are_dense_attention():
    case = Case([30, 17])
    covering = case.run(Setting(2, M, 8 * M, M))
    dense = case.run(Setting(2, 0, M, M, dense_len_tokens=30))
    causal = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[rows].transpose(0, 1) for x in (case.q, case.k, case.v)), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for rows in (slice(0, 30), slice(30, 47))
    ]
    torch.testing.assert_close(covering.out, torch.cat(causal))
    torch.testing.assert_close(dense.out, torch.cat(causal))
    assert not torch.allclose(case.run().out, torch.cat(causal))


def test_dense_len_is_a_bound_on_the_document_not_on_the_query():
    case = Case([30, 31])
    mixed = case.run(Setting(1, 0, M, M, dense_len_tokens=30))
    dense = case.run(Setting(1, 0, M, M, dense_len_tokens=31))
    sparse = case.run(Setting(1, 0, M, M))
    assert torch.equal(mixed.out[:30], dense.out[:30])
    torch.testing.assert_close(mixed.out[30:], sparse.out[30:], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(mixed.out[30:], dense.out[30:])


def test_queries_may_be_any_subset_in_any_order():
    case = Case([33, 26])
    rows = torch.randperm(59, generator=torch.Generator().manual_seed(3))[:20]
    q_pos, q_doc = case.positions()
    full = case.run()
    part = api.phsa_attention(
        case.q[rows], case.k, case.v, case.weights, case.cu_seqlens, q_pos=q_pos[rows], q_doc=q_doc[rows],
        **SETTING.kwargs(),
    )  # fmt: skip
    assert torch.equal(part.ids, full.ids[rows])
    torch.testing.assert_close(part.out, full.out[rows], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(part.lse, full.lse[rows])


def test_no_queries_give_empty_outputs():
    case = Case([20])
    none = torch.zeros(0, dtype=torch.int32)
    out = api.phsa_attention(
        case.q[:0], case.k, case.v, case.weights, case.cu_seqlens, q_pos=none, q_doc=none, **SETTING.kwargs()
    )
    assert [tuple(x.shape) for x in out] == [(0, 2, 4), (0, 2), (0, 1, 2)]


def test_slots_hold_the_blocks_in_any_order():
    case = Case([29, 3, 18])
    blocks_of_document = [-(-length // M) for length in case.lengths]
    num_blocks = sum(blocks_of_document)
    slot = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).to(torch.int32)
    shuffled = {name: torch.full((num_blocks * M, 1, 4), math.nan, dtype=torch.float64) for name in "kv"}
    block = start = 0
    for length, count in zip(case.lengths, blocks_of_document, strict=True):
        for b in range(count):
            size = min(M, length - b * M)
            where = int(slot[block + b]) * M
            for name in "kv":
                shuffled[name][where : where + size] = getattr(case, name)[
                    start + b * M : start + b * M + size
                ]
        block, start = block + count, start + length
    full = case.run()
    out, lse = api.attend(
        case.q, shuffled["k"], shuffled["v"], full.ids, *case.positions(), case.cu_seqlens, slot,
        **SETTING.attend_kwargs(),
    )  # fmt: skip
    assert torch.equal(out, full.out)
    assert torch.equal(lse, full.lse)


def test_ids_by_query_head_equal_the_same_ids_by_group():
    case = Case([47], heads=(4, 2))
    full = case.run()
    by_query_head = full.ids.repeat_interleave(2, dim=1)
    out, lse = api.attend(
        case.q, case.k, case.v, by_query_head, *case.positions(), case.cu_seqlens, **SETTING.attend_kwargs()
    )
    torch.testing.assert_close(out, full.out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, full.lse)


def test_no_ids_are_windows_only():
    case = Case([47])
    none = torch.zeros(47, 1, 0, dtype=torch.int32)
    absent = torch.full((47, 1, 3), -1, dtype=torch.int32)
    args = (*case.positions(), case.cu_seqlens)
    out, _ = api.attend(case.q, case.k, case.v, none, *args, **SETTING.attend_kwargs())
    same, _ = api.attend(case.q, case.k, case.v, absent, *args, **SETTING.attend_kwargs())
    assert torch.equal(out, same)
    assert not torch.allclose(out, case.run().out)


def test_a_block_named_twice_counts_once():
    case = Case([60])
    full = case.run(Setting(1, M, 2 * M, M))
    twice = torch.cat([full.ids, full.ids, torch.zeros_like(full.ids)], dim=2)  # block 0 is in init already
    out, _ = api.attend(
        case.q, case.k, case.v, twice, *case.positions(), case.cu_seqlens, **SETTING.attend_kwargs()
    )
    assert torch.equal(out, full.out)


def test_the_comparison_notices_ids_shifted_by_one():
    """Negative control: ids one block off change outputs and gradients beyond every tolerance."""
    case = Case([60])
    for tensor in (case.q, case.k, case.v):
        tensor.requires_grad_()
    out, _, chosen = case.oracle()
    ids = case.run().ids
    shifted = torch.where(ids > 0, ids - 1, ids)
    assert as_lists(shifted) != chosen
    wrong, _ = api.attend(
        case.q, case.k, case.v, shifted, *case.positions(), case.cu_seqlens, **SETTING.attend_kwargs()
    )
    assert not torch.allclose(wrong, out, rtol=1e-3, atol=1e-3)
    upstream = torch.ones_like(out)
    for mine, theirs in zip(case.gradients(wrong, upstream), case.gradients(out, upstream), strict=True):
        assert not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_keep_their_dtypes(dtype):
    case = Case([50])
    case.q, case.k, case.v = (x.to(dtype) for x in (case.q, case.k, case.v))
    out = case.run(weights=case.weights.float())
    assert (out.out.dtype, out.lse.dtype, out.ids.dtype) == (dtype, torch.float32, torch.int32)
    exact = Case([50])
    truth, _ = api.attend(
        *(x.double() for x in (case.q, case.k, case.v)), out.ids, *exact.positions(), exact.cu_seqlens,
        **SETTING.attend_kwargs(),
    )  # fmt: skip
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.out.double(), truth, rtol=2 * rounding, atol=2 * rounding)
