"""The largest attention logit against the eager reference's scores in fp64."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from phsa_kernels import reference
from phsa_megatron.attention import max_logit
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.max_logit import MaxLogitRecorder
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch

S, B, D, HEADS, KV = 48, 2, 8, 6, 2
BOUNDS = [0, 7, 48, 49, 90, 96, 96]
SETTINGS = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8)
TABLE = PunctuationTable.build(["."] * 50, PunctuationMatch.exact, PunctuationLanguage.en)
ROUNDED = 2**-24
"""Of an fp64 maximum that is kept in fp32."""


def _qkv():
    torch.manual_seed(0)
    shapes = [(S, B, HEADS, D), (S, B, KV, D), (S, B, KV, D)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _info(logits, **more):
    tokens = torch.randint(0, 50, (B, S), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    return SideInfo.build(tokens, cu_seqlens, TABLE, SETTINGS, 2, logits=logits, **more)


def _attend(cls, inputs, logits, layer=2, scale=None, **more):
    config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=1)
    core = cls(config, layer, AttnMaskType.causal, "self", softmax_scale=scale, attention=SETTINGS)
    return core(*inputs, None, packed_seq_params=_info(logits, **more))


def _by_reference(query, key, rows, scale=D**-0.5):
    """The largest score of some rows: the reference's softmax of one key at a time.

    With one allowed key its log-sum-exp is that key's logit, in fp64 until it is returned in fp32.
    """
    q, k = (x.transpose(0, 1).reshape(S * B, -1, D) for x in (query, key))
    largest = -torch.inf
    for row in rows:
        start = max(bound for bound in BOUNDS if bound <= row)
        for at in range(start, row + 1):
            one = torch.ones(KV, 1, 1, dtype=torch.bool)
            _, lse = reference._masked_attention(q[row : row + 1], k[at : at + 1], k[at : at + 1], one, scale)
            largest = max(largest, lse.max().item())
    return largest


@pytest.mark.parametrize("cls", [DenseCoreAttention, PHSACoreAttention])
@pytest.mark.parametrize("chunk_keys", [8192, 7])
def test_it_equals_the_reference_in_fp64(cls, chunk_keys, monkeypatch):
    monkeypatch.setattr(max_logit, "_CHUNK_KEYS", chunk_keys)
    query, key, value = _qkv()
    logits = MaxLogitRecorder(3, torch.device("cpu"), max_rows=S * B)
    plain = _attend(cls, (query, key, value), None)
    assert torch.equal(_attend(cls, (query, key, value), logits), plain)
    expected = _by_reference(query, key, range(S * B))
    assert logits.maxima[1].item() == pytest.approx(expected, rel=ROUNDED)
    assert logits.maxima[[0, 2]].eq(-torch.inf).all()
    # A key that only later queries, or only other documents, may see: without the mask it would be found.
    for token in (47, 6):
        loud = key.clone()
        loud[token, 0] = 0
        loud[token, 0, :, 0] = 1e3 * query[0, 0, 0, 0].sign()
        shown = query.clone()
        shown[token:, 0, :, 0] = 0  # of those that may see it, none has a product with it
        again = MaxLogitRecorder(3, torch.device("cpu"), max_rows=S * B)
        _attend(cls, (shown, loud, value), again)
        assert again.maxima[1].item() == pytest.approx(_by_reference(shown, loud, range(S * B)), rel=ROUNDED)
        everything = torch.einsum("sbhd,kbhd->bhsk", shown, loud.repeat_interleave(HEADS // KV, 2))
        assert everything.max() * D**-0.5 > 2 * again.maxima[1]


def test_it_looks_at_the_sampled_rows_of_every_micro_batch_and_keeps_the_largest():
    query, key, value = _qkv()
    sample = [0, 31, 63, 95]
    few = MaxLogitRecorder(2, torch.device("cpu"), max_rows=4)
    _attend(DenseCoreAttention, (query, key, value), few)
    expected = _by_reference(query, key, sample)
    assert few.maxima[1].item() == pytest.approx(expected, rel=ROUNDED)
    assert expected < _by_reference(query, key, range(S * B))
    # Half as large, and computed again as recomputation does: nothing changes. Twice as large: it does.
    for factor, largest in ((0.5, expected), (1.0, expected), (2.0, 2 * expected)):
        _attend(DenseCoreAttention, (factor * query, key, value), few)
        assert few.maxima[1].item() == pytest.approx(largest, rel=ROUNDED)


def test_the_scale_of_the_layer_is_used_and_depths_of_prediction_are_left_out():
    query, key, value = _qkv()
    logits = MaxLogitRecorder(2, torch.device("cpu"), max_rows=S * B)
    _attend(DenseCoreAttention, (query, key, value), logits, scale=3.0)
    expected = _by_reference(query, key, range(S * B), 3.0)
    assert logits.maxima[1].item() == pytest.approx(expected, rel=ROUNDED)
    assert _info(logits).at_mtp_depth(1).logits is None
