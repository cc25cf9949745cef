import pytest
import torch

from phsa_kernels.api import pool
from phsa_megatron.attention.pool_weights import pool_weights


def _by_hand(flags, bounds, m, lam):
    """The formula of the method page, section 2, token by token."""
    weights = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        for first in range(start, end, m):
            block = flags[first : min(first + m, end)]
            n, c = len(block), sum(block)
            weights += [lam / n + (1 - lam) * flag / c if c else 1 / n for flag in block]
    return torch.tensor(weights)


CASES = [
    [0, 40],
    [0, 1, 2, 40],
    [0, 3, 3, 3, 20, 40, 40, 40],
    [0, 0, 16, 32, 40],
    [0, 5, 12, 13, 29, 40],
]


@pytest.mark.parametrize("bounds", CASES)
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_equal_the_formula_and_sum_to_one_per_block(bounds, m, lam, share):
    torch.manual_seed(len(bounds))
    flags = torch.rand(40) < share
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    weights = pool_weights(flags, cu_seqlens, block_tokens=m, mean_weight_frac=lam)
    assert weights.dtype == torch.float32
    # Two roundings of sums of at most m terms that add up to 1.
    torch.testing.assert_close(weights, _by_hand(flags.int().tolist(), bounds, m, lam), rtol=4e-7, atol=0)
    for start, end in zip(bounds, bounds[1:], strict=False):
        for first in range(start, end, m):
            assert weights[first : min(first + m, end)].sum().item() == pytest.approx(1.0, abs=m * 6e-8)


def test_weights_have_the_shape_of_the_batch():
    flags = torch.zeros(2, 20, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 20, 40], dtype=torch.int32)
    assert pool_weights(flags, cu_seqlens, block_tokens=4, mean_weight_frac=0.5).shape == (2, 20)


def test_lambda_one_pools_exactly_as_without_weights():
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 7, 39, 64], dtype=torch.int32)
    weights = pool_weights(torch.rand(64) < 0.3, cu_seqlens, block_tokens=16, mean_weight_frac=1.0)
    key = torch.randn(64, 2, 8)
    assert torch.equal(pool(key, weights, cu_seqlens), pool(key, None, cu_seqlens))


def test_a_mark_changes_the_weights_of_its_own_block_only():
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    flags = torch.zeros(40, dtype=torch.bool)
    before = pool_weights(flags, cu_seqlens, block_tokens=8, mean_weight_frac=0.5)
    flags[19] = True
    changed = pool_weights(flags, cu_seqlens, block_tokens=8, mean_weight_frac=0.5) != before
    assert changed.nonzero().flatten().tolist() == list(range(16, 24))
