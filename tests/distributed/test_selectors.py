"""Under context parallelism, every selector without weights gives the output and gradients of one process."""

import torch

from phsa_megatron.config.schema import Selector
from phsa_megatron.config.selector_kinds import WITH_PARAMETERS
from tests import forks


def test_every_selector_on_two_processes_equals_one(tmp_path):
    ended = forks.run_ranks(2, "tests.distributed.selector_worker:main", tmp_path)
    assert [code for code, *_ in ended] == [0, 0], ended
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        assert set(results) == {selector.value for selector in set(Selector) - WITH_PARAMETERS}
        for selector, differences in results.items():
            assert differences.pop("control") > 0.1
            # fp64: sums of at most 128 terms in another order.
            assert all(value < 1e-12 for value in differences.values()), (selector, differences)
