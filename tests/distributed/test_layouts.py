"""The layout changes neither loss, nor any gradient, nor selection, nor what is generated.

One process computes the reference; two, four and eight processes compute the same step under each layout of
that many processes, all in one start. Weights are a function of each tensor's global name, so that nothing is
loaded from a file. Every sequence holds two documents, and the second starts off the boundaries of blocks and
of context-parallel chunks.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.layout_matrix import CASES, passes

# Four starts of python with megatron, two dozen layouts: about two minutes on two cores.
pytestmark = pytest.mark.slow

# Two layouts sum the same fp32 numbers in another order. A gradient element is a sum over 256 tokens of
# products through four layers; errors of sqrt(256) roundings of 2^-24, doubled at each of about eight
# operations, stay below this share of a tensor's largest element.
GRADIENT_BOUND = 2e-5
# With bf16 a gradient of keys and values is rounded (2^-9) when it leaves a process, when it is summed and
# when it goes on, in each of four layers, and both results are read in bf16: 14 roundings, were they all to
# add up.
BF16_GRADIENT_BOUND = 14 * 2**-9


def _assemble(ranks) -> dict[str, torch.Tensor]:
    """Returns whole gradients from the pieces of all ranks; every element must be there."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for key, shape, where, values in rank["pieces"]:
            whole.setdefault(key, torch.full(shape, torch.nan))[where] = values
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"a part of {key} is on no rank"
    return whole


def _norm(gradients) -> float:
    return sum(g.double().pow(2).sum().item() for g in gradients.values()) ** 0.5


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_loss_and_gradients_equal_one_process(results, layout, variant):
    (reference,), ranks = results[f"one-{variant}"], results[f"{layout}-{variant}"]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(reference["loss"], rel=1e-6)
        if reference["added"] is not None:
            assert reference["added"].item() > 0
            torch.testing.assert_close(rank["added"], reference["added"], rtol=1e-5, atol=0)
    expected, found = _assemble([reference]), _assemble(ranks)
    assert found.keys() == expected.keys()
    share = BF16_GRADIENT_BOUND if variant == "bf16" else GRADIENT_BOUND
    assert _norm(found) == pytest.approx(_norm(expected), rel=share if variant == "bf16" else 1e-6)
    for key, gradient in expected.items():
        bound = share * gradient.abs().max().item()
        assert bound > 0, f"{key} has no gradient: nothing is compared"
        torch.testing.assert_close(
            found[key], gradient, rtol=0, atol=bound, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_replicated_gradients_are_equal_on_all_ranks_that_hold_them(results, layout, variant):
    held: dict[tuple[str, str], torch.Tensor] = {}
    for rank in results[f"{layout}-{variant}"]:
        for key, _, where, values in rank["pieces"]:
            torch.testing.assert_close(values, held.setdefault((key, str(where)), values), rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_selection_statistics_and_samples_equal_one_process(results, layout, variant):
    (reference,), ranks = results[f"one-{variant}"], results[f"{layout}-{variant}"]
    # Recomputation runs every attention twice, and both are recorded.
    times = passes(layout)
    for rank in ranks:
        assert rank["sample"] == reference["sample"]
        # Pieces of heads, layers or text add up to the whole.
        torch.testing.assert_close(rank["selection"], times * reference["selection"], rtol=1e-5, atol=0)


def _selected(ranks) -> dict[tuple[int, int, int, int], tuple[int, ...]]:
    """Returns what each (layer, sequence, position, key-value head) selected, on whichever rank."""
    whole: dict[tuple[int, int, int, int], tuple[int, ...]] = {}
    for rank in ranks:
        for place, blocks in rank["selected"].items():
            assert whole.setdefault(place, blocks) == blocks, place
    return whole


@pytest.mark.parametrize(("layout", "variant"), [case for case in CASES if case[1] != "dense"])
def test_every_query_selects_the_same_blocks(results, layout, variant):
    expected = _selected(results[f"one-{variant}"])
    assert len(expected) == 4 * 4 * 64 * 2, "layers x sequences x positions x key-value heads"
    assert sum(max(blocks) >= 0 for blocks in expected.values()) > len(expected) // 2
    assert _selected(results[f"{layout}-{variant}"]) == expected


@pytest.mark.parametrize("variant", ["plain", "tied", "tied_mtp", "experts"])
def test_selection_is_not_a_matter_of_rounding(results, variant):
    """Equal blocks show something: no scores at the edge of a choice are as close as rounding errors."""
    (reference,) = results[f"one-{variant}"]
    assert 10 * GRADIENT_BOUND < reference["score_gap_frac"] < 1


def test_without_one_process_its_pooled_keys_nothing_is_equal(results):
    """Negative control: selection, loss and gradients all see that one process's pooled keys are zero."""
    (reference,), broken = results["one-plain"], results["broken-cp2"]
    expected, found = _selected([reference]), _selected(broken)
    differing = sum(found[place] != blocks for place, blocks in expected.items())
    assert differing > len(expected) // 20
    assert broken[0]["loss"] != pytest.approx(reference["loss"], rel=1e-6)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    plain, other = _assemble([reference])[key], _assemble(broken)[key]
    assert (plain - other).abs().max() > 100 * GRADIENT_BOUND * plain.abs().max()


def test_without_the_marks_of_one_process_loss_and_gradients_differ(results):
    """Negative control of the block-sparse exchange: selection is equal, the selected blocks do not come."""
    (reference,), unmarked = results["one-plain"], results["unmarked-cp4"]
    assert unmarked[0]["loss"] != pytest.approx(reference["loss"], rel=1e-6)
    key = "decoder.layers.self_attention.linear_qkv.weight"
    plain, other = _assemble([reference])[key], _assemble(unmarked)[key]
    assert (plain - other).abs().max() > 100 * GRADIENT_BOUND * plain.abs().max()


def test_the_bounds_see_one_block_less(results):
    """Negative control: at k = 1 instead of 2 gradients differ by far more than the bounds."""
    key = "decoder.layers.self_attention.linear_qkv.weight"
    plain, other = _assemble(results["one-plain"]), _assemble(results["one-k1"])
    assert (plain[key] - other[key]).abs().max() > 100 * GRADIENT_BOUND * plain[key].abs().max()
    plain, other = _assemble(results["one-bf16"]), _assemble(results["one-bf16-k1"])
    assert (plain[key] - other[key]).abs().max() > 10 * BF16_GRADIENT_BOUND * plain[key].abs().max()


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_the_largest_logits_equal_one_process_and_no_process_knows_them_alone(results, layout, variant):
    (reference,), ranks = results[f"one-{variant}"], results[f"{layout}-{variant}"]
    share = BF16_GRADIENT_BOUND if variant == "bf16" else GRADIENT_BOUND
    expected = reference["logits"]
    assert (expected > 0).all()
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], expected, rtol=share, atol=0)
    # Heads, keys, layers or text are spread: without the maximum over processes the answer is wrong.
    below = [((expected - rank["own_logits"]) > share * expected).any() for rank in ranks]
    assert any(below) or len(ranks) == 1, "every process has seen the largest logit of every layer"
