"""Dense attention over documents of many lengths as one launch: against fp64, and against one call each."""

from types import SimpleNamespace

import pytest
import torch

from phsa_megatron.attention import dense_attention
from phsa_megatron.attention.dense_attention import dense

# Document 3 is empty, as are the places after the last; queries of one tile belong to several documents.
BOUNDS = [0, 127, 128, 128, 700, 1024, 1999, 2048, 2048, 2048]
WITH_TOKENS = [0, 127, 128, 700, 1024, 1999, 2048]


def _side_info(bounds):
    return SimpleNamespace(
        once=lambda _, make: make(),
        document_bounds=lambda: [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a],
    )


def _inputs(tokens, heads, kv_heads, head_dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, h, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for h in (heads, kv_heads, kv_heads, heads)
    ]


def _with_gradients(inputs, upstream, bounds):
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = dense(q, k, v, _side_info(bounds), None)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (8, 8, 64), (8, 2, 128)])
def test_one_launch_is_as_near_to_fp64_as_a_call_for_each_document(monkeypatch, heads, kv_heads, head_dim):
    exact = _inputs(BOUNDS[-1], heads, kv_heads, head_dim, torch.bfloat16)
    *inputs, upstream = (x.cuda() for x in exact)
    expected = _with_gradients([x.double() for x in exact[:3]], exact[3].double(), BOUNDS)
    one = _with_gradients(inputs, upstream, BOUNDS)
    assert dense_attention._varlen() is not None, "this torch has no kernel for documents of many lengths"
    monkeypatch.setattr(dense_attention, "_varlen", lambda: None)
    each = _with_gradients(inputs, upstream, BOUNDS)
    wrong = _with_gradients(inputs, upstream, [bound for bound in BOUNDS if bound != 700])
    for what, a, b, c, true in zip(("out", "dq", "dk", "dv"), one, each, wrong, expected, strict=True):
        ours, theirs, control = ((x.cpu().double() - true).abs().max().item() for x in (a, b, c))
        # Both round to bf16 at the same places, and sum in orders of their own.
        assert ours <= 2 * theirs, f"{what}: {ours:.2e} from fp64, one by one {theirs:.2e}"
        assert control > 10 * theirs, f"{what}: a document joined to the next one would not be seen"


@pytest.mark.parametrize("knows_groups", [False, True])
def test_the_kernel_is_given_documents_with_tokens_and_the_causal_mask(monkeypatch, knows_groups):
    """Empty ones cost it time. Its two signatures: before torch 2.12 it had no word for groups."""
    asked = {}

    def before(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        asked.update(cu=cu_q.tolist(), same=cu_q is cu_k, longest=(max_q, max_k), window=window_size)
        return query

    def after(*args, enable_gqa=False, **kwargs):
        asked["enable_gqa"] = enable_gqa
        return before(*args, **kwargs)

    module = SimpleNamespace(varlen_attn=after if knows_groups else before)
    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", module)
    dense_attention._varlen.cache_clear()
    try:
        q, k, v, _ = _inputs(BOUNDS[-1], 4, 2, 8)
        dense_attention._packed(q, k, v, _side_info(BOUNDS), None)
    finally:
        dense_attention._varlen.cache_clear()
    told = {"enable_gqa": True} if knows_groups else {}
    assert asked == {"cu": WITH_TOKENS, "same": True, "longest": (975, 975), "window": (-1, 0)} | told
