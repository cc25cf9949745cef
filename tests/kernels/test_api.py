"""The door's own checks: each bad argument is refused by a message that names it and the rule."""

import pytest
import torch
from phsa_cases import SETTING, Case, M

from phsa_kernels import api


def arguments(op):
    """Valid positional and keyword arguments of an op, to be spoilt one at a time."""
    case = Case([30, 11], heads=(4, 2))
    q_pos, q_doc = case.positions()
    if op == "pool":
        return {"k": case.k, "weights": case.weights, "cu_seqlens": case.cu_seqlens, "block_tokens": M}
    if op == "select":
        pooled = api.pool(case.k, case.weights, case.cu_seqlens, block_tokens=M)
        cu_blocks = api.block_boundaries(case.cu_seqlens, M)
        return {"q": case.q, "pooled": pooled, "q_pos": q_pos, "q_doc": q_doc, "cu_blocks": cu_blocks} | (
            SETTING.select_kwargs()
        )
    tensors = {"q": case.q, "k": case.k, "v": case.v, "cu_seqlens": case.cu_seqlens}
    if op == "attend":
        ids = case.run().ids
        return tensors | {"ids": ids, "q_pos": q_pos, "q_doc": q_doc} | SETTING.attend_kwargs()
    return tensors | {"weights": case.weights} | SETTING.kwargs()


@pytest.mark.parametrize("op", ["pool", "select", "attend", "phsa_attention"])
def test_the_arguments_spoilt_below_are_valid_before(op):
    getattr(api, op)(**arguments(op))


int64 = torch.zeros(41, dtype=torch.int64)
short = torch.zeros(40, dtype=torch.int32)
REFUSED = [
    ("pool", "k", torch.zeros(41, 4), r"k must be \[Tk, Hkv, D\], got \(41, 4\)"),
    ("pool", "kind", "median", "kind='median' is unknown; use one of mean"),
    ("pool", "block_tokens", 0, "block_tokens=0 must be at least 1"),
    ("pool", "cu_seqlens", int64, "cu_seqlens must be a 1-D int32 tensor"),
    (
        "pool",
        "cu_seqlens",
        torch.tensor([0, 30], dtype=torch.int32),
        "cu_seqlens ends at 30, k has 41 tokens",
    ),
    ("pool", "weights", torch.zeros(40), r"weights must be \[Tk\] or \[Tk, Hkv\]"),
    ("pool", "weights", torch.zeros(41, 4), r"weights must be \[Tk\] or \[Tk, Hkv\]"),
    ("pool", "impl", "cuda", "impl='cuda' is unknown; use one of reference, triton"),
    ("select", "pooled", torch.zeros(9, 2, 4), r"pooled must be \[NB, Hkv, V, D\]"),
    ("select", "q", torch.zeros(41, 3, 4), "3 query heads do not divide among 2 key-value heads"),
    ("select", "q", torch.zeros(41, 4, 8), "q has head dim 8, keys have 4"),
    ("select", "q", torch.zeros(41, 16), r"q must be \[Tq, Hq, D\]"),
    ("select", "topk", 0, "topk=0 must be at least 1"),
    ("select", "init_tokens", 6, "init_tokens=6 must be a multiple of block_tokens=4, or 0"),
    ("select", "init_tokens", -4, "init_tokens=-4 must be a multiple"),
    ("select", "local_tokens", 0, "local_tokens=0 must be a positive multiple of block_tokens=4"),
    ("select", "local_tokens", 7, "local_tokens=7 must be a positive multiple"),
    ("select", "group_score", "max", "group_score='max' is unknown; use one of softmax_sum"),
    ("select", "score", "cosine", "score='cosine' is unknown; use one of dot"),
    ("select", "q_pos", short, "q_pos has 40 entries, expected 41"),
    ("select", "q_doc", int64, "q_doc must be a 1-D int32 tensor"),
    ("select", "cu_blocks", int64, "cu_blocks must be a 1-D int32 tensor"),
    ("attend", "v", torch.zeros(41, 2, 8), "k and v must be"),
    ("attend", "q", torch.zeros(41, 3, 4), "3 query heads do not divide"),
    ("attend", "ids", torch.zeros(41, 3, 2, dtype=torch.int32), r"ids must be int32 \[Tq, Hkv or Hq, k\]"),
    ("attend", "ids", torch.zeros(41, 2, 2), "ids must be int32"),
    ("attend", "dense_len_tokens", -1, "dense_len_tokens=-1 must not be negative"),
    ("attend", "q_pos", int64, "q_pos must be a 1-D int32 tensor"),
    ("attend", "cu_seqlens", int64, "cu_seqlens must be a 1-D int32 tensor"),
    (
        "attend",
        "cu_seqlens",
        torch.tensor([0, 30], dtype=torch.int32),
        "cu_seqlens ends at 30, k has 41 tokens",
    ),
    ("attend", "block_slot", int64, "block_slot must be a 1-D int32 tensor"),
    ("phsa_attention", "q_pos", short, "give both q_pos and q_doc, or neither"),
    ("phsa_attention", "q", torch.zeros(40, 4, 4), "40 queries and 41 keys: give q_pos and q_doc"),
]


@pytest.mark.parametrize(("op", "name", "value", "message"), REFUSED)
def test_bad_argument_is_refused(op, name, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(api, op)(**arguments(op) | {name: value})


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("pool", "kind", "moments"),
        ("select", "group_score", "per_head"),
        ("phsa_attention", "kind", "minmax"),
    ],
)
def test_what_the_contract_names_but_the_reference_lacks_is_refused(op, name, value):
    with pytest.raises(NotImplementedError, match=f"{name}='{value}'.*impl='reference' has"):
        getattr(api, op)(**arguments(op) | {name: value})


def test_positions_skip_empty_documents():
    position, doc = api.token_positions(torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32), 5)
    assert position.tolist() == [0, 1, 2, 0, 1]
    assert doc.tolist() == [1, 1, 1, 3, 3]
    assert position.dtype == doc.dtype == torch.int32
