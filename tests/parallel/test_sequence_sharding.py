import pytest
import torch

from phsa_megatron.config.schema import ContextSharding
from phsa_megatron.config.sequence_chunks import own_chunks
from phsa_megatron.parallel.sequence_sharding import natural_order, own_part, own_positions


def test_two_chunks_from_both_ends():
    assert [own_chunks(3, rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert own_positions(12, 3, 1).tolist() == [2, 3, 8, 9]
    assert own_positions(12, 1, 0).tolist() == list(range(12))


def test_contiguous_chunks_are_one_piece():
    assert [own_chunks(3, rank, ContextSharding.contiguous) for rank in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert own_positions(12, 3, 1, ContextSharding.contiguous).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("sharding", list(ContextSharding))
@pytest.mark.parametrize("size", [1, 2, 5])
def test_natural_order_undoes_the_split(size, sharding):
    rows = torch.arange(2 * 20).view(2, 20)
    parts = torch.cat([own_part(rows, size, rank, sharding) for rank in range(size)], 1)
    chunks = parts.view(2, 2 * size, -1)
    assert torch.equal(chunks[:, natural_order(size, sharding)].view(2, 20), rows)


def test_the_split_is_that_of_megatron():
    """RoPE slices its frequencies by megatron's own function; another split would rotate wrongly."""
    from types import SimpleNamespace

    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    positions = torch.arange(24)
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        expected = get_pos_emb_on_this_cp_rank(positions.view(24, 1), 0, group).flatten()
        assert torch.equal(own_positions(24, 3, rank), expected)


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="20 tokens do not divide into 2 x 3 chunks"):
        own_positions(20, 3, 0)
