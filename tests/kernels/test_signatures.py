"""The ops are a public door: their signatures change only together with this table."""

import inspect

import pytest

import phsa_kernels
from phsa_kernels import api

KEYWORD = inspect.Parameter.KEYWORD_ONLY
WINDOWS = {"topk": ..., "init_tokens": ..., "local_tokens": ..., "block_tokens": 16}
# Name -> default, `...` for none; the names before "*" may be given by position.
SIGNATURES = {
    "pool": {
        "k": ..., "weights": ..., "cu_seqlens": ...,
        "*": {"block_tokens": 16, "kind": "mean", "impl": "reference"},
    },
    "select": {
        "q": ..., "pooled": ..., "q_pos": ..., "q_doc": ..., "cu_blocks": ...,
        "*": WINDOWS | {
            "group_score": "softmax_sum", "score": "dot", "softmax_scale": None, "impl": "reference",
        },
    },
    "attend": {
        "q": ..., "k": ..., "v": ..., "ids": ..., "q_pos": ..., "q_doc": ..., "cu_seqlens": ...,
        "block_slot": None,
        "*": {
            "init_tokens": ..., "local_tokens": ..., "block_tokens": 16, "dense_len_tokens": 0,
            "softmax_scale": None, "impl": "reference",
        },
    },
    "phsa_attention": {
        "q": ..., "k": ..., "v": ..., "weights": ..., "cu_seqlens": ...,
        "*": WINDOWS | {
            "group_score": "softmax_sum", "kind": "mean", "score": "dot", "dense_len_tokens": 0,
            "softmax_scale": None, "q_pos": None, "q_doc": None, "impl": "reference",
        },
    },
    "append_keys": {
        "k": ..., "v": ..., "marks": ..., "lengths": ..., "k_cache": ..., "v_cache": ..., "pooled_cache": ...,
        "open_sums": ..., "open_marks": ...,
        "*": {"block_tokens": 16, "mean_weight_frac": 0.5, "impl": "reference"},
    },
    "decode_attention": {
        "q": ..., "k_cache": ..., "v_cache": ..., "pooled_cache": ..., "lengths": ...,
        "*": WINDOWS | {
            "group_score": "softmax_sum", "dense_len_tokens": 0, "softmax_scale": None, "impl": "reference",
        },
    },
}  # fmt: skip


def described(function) -> dict:
    """A signature in the form of the table."""
    table: dict = {}
    for parameter in inspect.signature(function).parameters.values():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        if parameter.kind is KEYWORD:
            table.setdefault("*", {})[parameter.name] = default
        else:
            assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            table[parameter.name] = default
    return table


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_frozen(name):
    found = described(getattr(api, name))
    assert found == SIGNATURES[name]
    assert list(found) == list(SIGNATURES[name])
    assert list(found["*"]) == list(SIGNATURES[name]["*"])


@pytest.mark.parametrize("name", SIGNATURES)
def test_door_and_package_are_one(name):
    assert getattr(phsa_kernels, name) is getattr(api, name)


def test_no_other_op_is_public():
    assert set(phsa_kernels.__all__) == set(SIGNATURES) | {"PHSAOutput", "DecodeOutput"}


def test_output_names_are_frozen():
    assert api.PHSAOutput._fields == api.DecodeOutput._fields == ("out", "lse", "ids")
    assert api.IMPLS == ("reference", "triton")


def test_table_notices_a_changed_default():
    def pool(k, weights, cu_seqlens, *, block_tokens=32, kind="mean", impl="reference"): ...

    assert described(pool) != SIGNATURES["pool"]
