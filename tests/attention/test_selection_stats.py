import pytest
import torch

from phsa_kernels.api import phsa_attention
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.selection_stats import (
    SelectionRecorder,
    frac_queries_with_more_candidates_than_k,
)
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch

BOUNDS = [0, 7, 48, 49, 90, 96]
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)


def _selection(topk=2, **changes):
    """Returns one layer's query, key, value, attention output, and its side information."""
    settings = AttentionConfig(**{"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, **changes})
    torch.manual_seed(0)
    info = SideInfo.build(
        torch.randint(0, 50, (2, 48)), torch.tensor(BOUNDS, dtype=torch.int32), TABLE, settings, topk
    )
    q, k, v = torch.randn(96, 6, 8), torch.randn(96, 2, 8), torch.randn(96, 2, 8)
    found = phsa_attention(
        q,
        k,
        v,
        info.pool_weights.flatten(),
        info.cu_seqlens,
        topk=topk,
        block_tokens=4,
        init_tokens=4,
        local_tokens=8,
        dense_len_tokens=settings.dense_len_tokens,
    )
    return q, k, v, found, info


def _by_hand(q, k, ids, info, dense_len=0):
    """Returns (selected mass, attended keys, has a choice), all shares, by a loop over queries and heads."""
    mass, attended, causal, choice = [], 0, 0, 0
    for start, end in info.document_bounds():
        for i in range(start, end):
            keys = torch.arange(start, i + 1)
            block, current = (keys - start) // 4, (i - start) // 4
            window = (block < 1) | (block > current - 2)
            choice += int((~window).sum() // 4 > info.topk and end - start > dense_len)
            for head in range(6):
                chosen = torch.isin(block, ids[i, head // 3]) & ~window
                seen = window | chosen
                if end - start <= dense_len:
                    chosen, seen = torch.zeros_like(seen), torch.ones_like(seen)
                probs = (k[keys[seen], head // 3] @ q[i, head] * 8**-0.5).softmax(0)
                mass.append(probs[chosen[seen]].sum())
                attended += int(seen.sum())
                causal += len(keys)
    return torch.stack(mass).mean().item(), attended / causal, choice / info.token_ids.numel()


@pytest.mark.parametrize(("topk", "dense_len"), [(1, 0), (2, 0), (50, 0), (2, 7)])
def test_statistics_equal_a_loop_over_queries_and_heads(topk, dense_len):
    q, k, v, found, info = _selection(topk, dense_len_tokens=dense_len)
    recorder = SelectionRecorder(num_layers=3)
    recorder.record(2, q, k, v, found.ids, found.lse, info)
    layers = recorder.layers()
    assert list(layers) == [2]
    mass, attended, choice = _by_hand(q, k, found.ids, info, dense_len)
    assert layers[2].selected_mass_frac == pytest.approx(mass, abs=2e-6)
    assert layers[2].attended_key_frac == pytest.approx(attended, abs=1e-12)
    assert layers[2].frac_queries_with_more_candidates_than_k == pytest.approx(choice, abs=1e-12)
    whole = frac_queries_with_more_candidates_than_k(info.cu_seqlens, info.attention, topk)
    assert whole == pytest.approx(choice, abs=1e-12)
    assert (choice == 0) == (topk == 50), "the case shows nothing"


def test_sampled_queries_come_near_all_queries_and_sums_of_processes_add_up():
    q, k, v, found, info = _selection()
    whole, sampled = SelectionRecorder(1), SelectionRecorder(1, max_rows=48)
    for recorder in (whole, sampled):
        recorder.record(1, q, k, v, found.ids, found.lse, info)
    assert sampled.sums[0, 0] == 48 * 6
    assert sampled.layers()[1].selected_mass_frac == pytest.approx(
        whole.layers()[1].selected_mass_frac, rel=0.2
    )
    assert whole.layers(whole.sums * 2) == whole.layers()


def test_documents_within_the_windows_leave_nothing_to_choose():
    settings = AttentionConfig(block_tokens=16, init_tokens=16, local_tokens=128)

    def share(length, topk):
        bounds = torch.tensor([0, length, length], dtype=torch.int32)
        return frac_queries_with_more_candidates_than_k(bounds, settings, topk)

    assert share(144, 1) == 0.0
    # Block 11 is the first with three candidates: 1 to 3, after init (0) and before local (4 to 11).
    assert share(192 - 16, 2) == 0.0
    assert share(352, 2) == pytest.approx((352 - 176) / 352)
    assert frac_queries_with_more_candidates_than_k(torch.zeros(2, dtype=torch.int32), settings, 2) == 0.0
