from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from phsa_megatron.attention import dense_attention
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import (
    AttentionConfig,
    KernelImpl,
    PunctuationLanguage,
    PunctuationMatch,
)

S, B, D = 48, 2, 8
BOUNDS = [0, 7, 48, 49, 90, 96, 96]
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)


def _settings(**changes):
    return AttentionConfig(**{"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, **changes})


def _attention(cls=PHSACoreAttention, settings=None, config=None, **kwargs):
    config = config or SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)
    kwargs = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", **kwargs}
    return cls(config, 1, attention=settings or _settings(), **kwargs)


def _info(settings=None, topk=2, seq_len=S, bounds=BOUNDS):
    tokens = torch.randint(0, 50, (B, seq_len), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return SideInfo.build(tokens, cu_seqlens, TABLE, settings or _settings(), topk)


def _qkv(heads=6, kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(S, B, heads, D), (S, B, kv_heads, D), (S, B, kv_heads, D)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _masked_softmax(q, k, v):
    """Dense attention inside documents, with a T x T mask, in the inputs' own precision."""
    q, k, v = (x.transpose(0, 1).reshape(S * B, -1, D) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    token = torch.arange(S * B)
    document = torch.bucketize(token, torch.tensor(BOUNDS), right=True)
    allowed = (document[:, None] == document) & (token[:, None] >= token)
    scores = torch.einsum("qhd,khd->hqk", q, k) * D**-0.5
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)
    return out.reshape(B, S, -1).transpose(0, 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (4, 1)])
def test_dense_equals_masked_softmax_in_output_and_gradients(heads, kv_heads):
    inputs = _qkv(heads, kv_heads)
    out = _attention(DenseCoreAttention)(*inputs, None, packed_seq_params=_info())
    assert out.shape == (S, B, heads * D)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, upstream)
    expected_out = _masked_softmax(*inputs)
    expected = torch.autograd.grad(expected_out, inputs, upstream)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("bounds", "asked"), [([0, 48, 96], True), (BOUNDS, False)])
def test_dense_asks_cudnn_only_where_all_documents_have_one_length(monkeypatch, bounds, asked):
    """cuDNN plans every new length anew; torch's own order, which differs by version, must not be met."""
    allowed = []

    def attention(*inputs, **settings):
        first = torch._C._get_sdp_priority_order()[0]
        cudnn_first = first == int(SDPBackend.CUDNN_ATTENTION) and torch.backends.cuda.cudnn_sdp_enabled()
        allowed.append((torch.backends.cuda.cudnn_sdp_enabled(), cudnn_first))
        return scaled_dot_product_attention(*inputs, **settings)

    monkeypatch.setattr(dense_attention, "scaled_dot_product_attention", attention)
    _attention(DenseCoreAttention)(*_qkv(), None, packed_seq_params=_info(bounds=bounds))
    assert allowed == [(asked, asked)] * (1 if asked else 5)


def test_dense_documents_are_split_and_not_sliced():
    """The backward pass of a slice fills a tensor of all tokens for each document."""
    out = _attention(DenseCoreAttention)(*_qkv(), None, packed_seq_params=_info())
    names, ahead = set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        names.add(node.name())
        ahead += [before for before, _ in node.next_functions if before is not None]
    assert "SplitWithSizesBackward0" in names and "SliceBackward0" not in names


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (16, 1)])
def test_phsa_with_windows_over_everything_equals_dense(heads, kv_heads):
    inputs = _qkv(heads, kv_heads)
    settings = _settings(init_tokens=24, local_tokens=24)
    dense = _attention(DenseCoreAttention)(*inputs, None, packed_seq_params=_info())
    phsa = _attention(settings=settings)(*inputs, None, packed_seq_params=_info(settings))
    torch.testing.assert_close(phsa, dense, rtol=1e-12, atol=1e-12)
    sparse = _attention()(*inputs, None, packed_seq_params=_info(topk=1))
    assert not torch.allclose(sparse, dense, rtol=1e-3, atol=1e-3), "the windows cover everything anyway"


def test_dense_len_makes_short_documents_dense():
    inputs = _qkv()
    settings = _settings(dense_len_tokens=41)
    dense = _attention(DenseCoreAttention)(*inputs, None, packed_seq_params=_info())
    phsa = _attention(settings=settings)(*inputs, None, packed_seq_params=_info(settings, topk=1))
    torch.testing.assert_close(phsa, dense, rtol=1e-12, atol=1e-12)


def test_topk_is_taken_from_the_pass_not_from_the_module():
    inputs = _qkv()
    attention = _attention()
    one, all_blocks = (attention(*inputs, None, packed_seq_params=_info(topk=k)) for k in (1, 99))
    assert not torch.allclose(one, all_blocks, rtol=1e-3, atol=1e-3)
    dense = _attention(DenseCoreAttention)(*inputs, None, packed_seq_params=_info())
    torch.testing.assert_close(all_blocks, dense, rtol=1e-12, atol=1e-12)


def test_punctuation_changes_what_is_selected():
    inputs = _qkv()
    half, mean = _settings(mean_weight_frac=0.5), _settings(mean_weight_frac=1.0)
    out_half, out_mean = (
        _attention(settings=s)(*inputs, None, packed_seq_params=_info(s, topk=1)) for s in (half, mean)
    )
    assert not torch.allclose(out_half, out_mean, rtol=1e-3, atol=1e-3)


def test_lambda_one_equals_pooling_without_weights():
    inputs = _qkv()
    settings = _settings(mean_weight_frac=1.0)
    info = _info(settings)
    expected = _attention(settings=settings)(*inputs, None, packed_seq_params=info)
    info.pool_weights = torch.full_like(info.pool_weights, 1 / settings.block_tokens)
    assert torch.equal(_attention(settings=settings)(*inputs, None, packed_seq_params=info), expected)


@pytest.mark.parametrize("cls", [PHSACoreAttention, DenseCoreAttention])
def test_one_document_never_sees_another(cls):
    inputs = _qkv()
    before = _attention(cls)(*inputs, None, packed_seq_params=_info())
    with torch.no_grad():
        for x in inputs:
            x[7:48, 0] = 100.0  # document 1: row 0 from token 7 on
    after = _attention(cls)(*inputs, None, packed_seq_params=_info())
    assert torch.equal(before[:7, 0], after[:7, 0]) and torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[7:, 0], after[7:, 0])


@pytest.mark.parametrize("cls", [PHSACoreAttention, DenseCoreAttention])
def test_missing_or_wrong_side_information_is_refused(cls):
    inputs, attention = _qkv(), _attention(cls)
    with pytest.raises(TypeError, match="layer 1 got NoneType instead of a SideInfo"):
        attention(*inputs, None)
    shorter = _info(seq_len=24, bounds=[0, 24, 48])
    with pytest.raises(ValueError, match=r"side information's \[b, S\] = \(2, 24\)"):
        attention(*inputs, None, packed_seq_params=shorter)
    info = _info()
    with pytest.raises(ValueError, match="must be None"):
        attention(*inputs, torch.ones(1), packed_seq_params=info)
    with pytest.raises(ValueError, match="must be None"):
        attention(*inputs, None, attention_bias=torch.ones(1), packed_seq_params=info)
    with pytest.raises(ValueError, match="must be causal"):
        attention(*inputs, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=info)


@pytest.mark.parametrize("cls", [PHSACoreAttention, DenseCoreAttention])
def test_what_it_does_not_do_is_refused_at_construction(cls):
    with pytest.raises(ConfigError, match="dropout is 0.1"):
        _attention(cls, attention_dropout=0.1)
    with pytest.raises(ConfigError, match="dropout is 0.2"):
        _attention(cls, config=SimpleNamespace(attention_dropout=0.2, context_parallel_size=1))
    with pytest.raises(ConfigError, match="causal self-attention"):
        _attention(cls, attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(ConfigError, match="causal self-attention"):
        _attention(cls, attention_type="cross")


def test_new_constructor_arguments_of_megatron_are_taken_only_if_harmless():
    _attention(name="decoder.layers.0", something_new=None)
    with pytest.raises(DeviceError, match="something_new"):
        _attention(something_new=3)


def test_an_implementation_that_is_not_there_is_refused():
    settings = _settings(impl=KernelImpl.triton)
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match="triton"):
        _attention(settings=settings)(*_qkv(), None, packed_seq_params=_info(settings))
