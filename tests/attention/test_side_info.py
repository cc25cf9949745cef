import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from phsa_megatron.attention.pool_weights import pool_weights
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch

BOUNDS = [0, 5, 20, 33, 40, 40]
SETTINGS = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8)
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)


def _tokens():
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def _build(tokens=None, bounds=BOUNDS, topk=2):
    tokens = _tokens() if tokens is None else tokens
    return SideInfo.build(tokens, torch.tensor(bounds, dtype=torch.int32), TABLE, SETTINGS, topk)


def test_it_is_megatrons_carrier_in_sbhd_form_with_rows_as_sequences():
    info = _build()
    assert isinstance(info, PackedSeqParams) and info.qkv_format == "sbhd"
    assert info.max_seqlen_q == info.max_seqlen_kv == 20
    assert info.cu_seqlens_q.tolist() == info.cu_seqlens_kv.tolist() == [0, 20]


def test_weights_follow_from_the_token_ids():
    info = _build()
    flags = (_tokens() % 5 == 0).view(2, 20)
    assert torch.equal(info.is_punctuation, flags)
    expected = pool_weights(flags, info.cu_seqlens, block_tokens=4, mean_weight_frac=0.5)
    assert torch.equal(info.pool_weights, expected)


def test_positions_restart_at_documents_and_are_computed_once():
    info = _build()
    position, document = info.positions()
    expected = [i - start for start, end in zip(BOUNDS, BOUNDS[1:], strict=False) for i in range(start, end)]
    assert position.tolist() == expected
    assert document.tolist() == [0] * 5 + [1] * 15 + [2] * 13 + [3] * 7
    assert info.positions()[0] is position


def test_documents_without_tokens_are_left_out_of_the_bounds():
    assert _build().document_bounds() == [(0, 5), (5, 20), (20, 33), (33, 40)]


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_at_a_prediction_depth_a_key_stands_for_a_later_token_of_its_document(depth):
    info = _build()
    shifted = info.at_mtp_depth(depth)
    ids, flags = info.token_ids.flatten(), info.is_punctuation.flatten()
    for start, end in info.document_bounds():
        for i in range(start, end):
            inside = i + depth < end
            assert shifted.is_punctuation.flatten()[i] == (flags[i + depth] if inside else False)
            assert shifted.token_ids.flatten()[i] == (ids[i + depth] if inside else 0)
    expected = pool_weights(shifted.is_punctuation, info.cu_seqlens, block_tokens=4, mean_weight_frac=0.5)
    assert torch.equal(shifted.pool_weights, expected)
    assert not torch.equal(shifted.pool_weights, info.pool_weights)
    assert shifted is info.at_mtp_depth(depth) and info.at_mtp_depth(0) is info
    assert shifted.topk == info.topk and torch.equal(shifted.cu_seqlens, info.cu_seqlens)


def test_prediction_loss_mask_drops_targets_beyond_the_document():
    info = _build()
    mask = info.mtp_loss_mask(torch.ones(2, 20), 1).flatten()
    # megatron rolls the mask by one at depth 1: what is left must have its next token in the same document.
    _, document = info.positions()
    rolled = mask.roll(-1)
    for i in range(40):
        if i % 20 == 19:
            continue  # megatron zeroes the end of a row itself
        assert rolled[i] == float(document[i] == document[i + 1])


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 39], "rise from 0 to b \\* S = 40"),
        ([1, 20, 40], "rise from 0"),
        ([0, 25, 20, 40], "rise from 0"),
        ([0, 40], "multiple of S=20"),
    ],
)
def test_wrong_boundaries_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        _build(bounds=bounds)


def test_wrong_shapes_dtypes_and_k_are_refused():
    with pytest.raises(ValueError, match=r"token_ids must be int64 \[b, S\]"):
        _build(tokens=_tokens().flatten())
    with pytest.raises(ValueError, match="token_ids must be int64"):
        _build(tokens=_tokens().int())
    with pytest.raises(ValueError, match="cu_seqlens must be int32"):
        SideInfo.build(_tokens(), torch.tensor(BOUNDS), TABLE, SETTINGS, 2)
    with pytest.raises(ValueError, match="topk=0"):
        _build(topk=0)
