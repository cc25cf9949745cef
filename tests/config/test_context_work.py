from pathlib import Path

import pytest
import torch

from phsa_kernels import reference
from phsa_kernels.api import block_boundaries, phsa_attention, token_positions
from phsa_megatron.config.context_work import context_work, table
from phsa_megatron.config.schema import AttentionConfig, ContextSharding
from phsa_megatron.parallel.sequence_sharding import own_positions

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"


def _counted(bounds, attention, own):
    """Returns the pairs that the reference scores and attends for the queries `own`, and the blocks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(bounds[-1], 1, 4, generator=generator) for _ in range(3))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    position, document = token_positions(cu_seqlens, bounds[-1])
    counts = {"scored": 0, "attended": 0}
    scores, allowed = reference._block_scores, reference._allowed_keys

    def count_scores(q, keys, current, *args):
        found = scores(q, keys, current, *args)
        counts["scored"] += int((found > 0).sum())
        return found

    def count_allowed(*args, **kwargs):
        mask = allowed(*args, **kwargs)
        counts["attended"] += int(mask.sum())
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_block_scores", count_scores)
        patch.setattr(reference, "_allowed_keys", count_allowed)
        phsa_attention(
            q[own],
            k,
            v,
            None,
            cu_seqlens,
            topk=attention.train_topk,
            init_tokens=attention.init_tokens,
            local_tokens=attention.local_tokens,
            block_tokens=attention.block_tokens,
            dense_len_tokens=attention.dense_len_tokens,
            q_pos=position[own],
            q_doc=document[own],
        )
    return counts["scored"], counts["attended"], block_boundaries(cu_seqlens, attention.block_tokens)[-1]


@pytest.mark.parametrize("sharding", list(ContextSharding))
@pytest.mark.parametrize("bounds", [[0, 192], [0, 5, 70, 131, 192], [0, 96, 97, 192]], ids=str)
def test_work_is_what_the_reference_counts(bounds, sharding):
    attention = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8, train_topk=2)
    for size in (1, 2, 4):
        for rank, work in enumerate(context_work(bounds, attention, size, sharding)):
            own = own_positions(192, size, rank, sharding)
            scored, attended, num_blocks = _counted(bounds, attention, own)
            assert num_blocks > 40
            assert (work.scored_pairs, work.attended_pairs) == (scored, attended)


def test_short_documents_that_attend_densely_score_nothing():
    attention = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8, dense_len_tokens=60)
    bounds = [0, 60, 192]
    for rank, work in enumerate(context_work(bounds, attention, 2, ContextSharding.zigzag)):
        _, attended, _ = _counted(bounds, attention, own_positions(192, 2, rank))
        assert work.attended_pairs == attended
    first = context_work([0, 60], attention, 1, ContextSharding.zigzag)[0]
    assert (first.scored_pairs, first.attended_pairs) == (0, 60 * 61 // 2)


@pytest.mark.parametrize("sharding", list(ContextSharding))
@pytest.mark.parametrize("bounds", [[0, 192], [0, 5, 70, 131, 192], [0, 3, 50, 95, 96, 97, 192]], ids=str)
def test_reachable_tokens_equal_a_set_of_tokens(bounds, sharding):
    attention = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8)
    for rank, work in enumerate(context_work(bounds, attention, 4, sharding)):
        own = set(own_positions(192, 4, rank, sharding).tolist())
        reachable = set()
        for start, end in zip(bounds, bounds[1:], strict=False):
            for token in range(start, end):
                if token in own:
                    block_end = start + ((token - start) // 4 + 1) * 4
                    reachable |= set(range(start, min(block_end, end)))
        assert work.reachable_tokens == len(reachable - own)


def test_zigzag_balances_scoring_of_one_document_and_contiguous_does_not():
    attention = AttentionConfig(init_tokens=128, local_tokens=512)
    zigzag, contiguous = (
        [w.scored_pairs for w in context_work([0, 32768], attention, 4, sharding)]
        for sharding in ContextSharding
    )
    assert max(zigzag) == min(zigzag)
    assert max(contiguous) > 1.7 * sum(contiguous) / 4


def test_the_page_shows_the_counted_balance():
    assert table() in PAGE.read_text(encoding="utf-8"), "print it anew: context_work.py"
