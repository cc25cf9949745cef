"""Losses that layers add: SSA's alignment and the indexer's distillation, against eager fp64 autograd."""

import pytest
import torch

from phsa_megatron.attention.added_losses import ALIGN, INDEX, AddedLosses
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.layer_input import LayerInput
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import (
    AttentionKind,
    PunctuationLanguage,
    PunctuationMatch,
    Recompute,
    Selector,
)
from phsa_megatron.model.factory import build_model

S, B = 64, 2
BOUNDS = [0, 7, 64, 90, 128]
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)
TOKENS = torch.randint(0, 100, (B, S), generator=torch.Generator().manual_seed(0))
ALIGNED = {"attention__align_coeff": 10.0}
INDEXED = {
    "attention__selector": Selector.indexer,
    "attention__mean_weight_frac": 1.0,
    "attention__indexer_coeff": 3.0,
}


def _side_info(config, losses=None, bounds=BOUNDS, tokens=TOKENS, **settings):
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return SideInfo.build(tokens, cu_seqlens, TABLE, config.attention, 1, losses=losses, **settings)


def _forward(model, config, losses=None, tokens=TOKENS, bounds=BOUNDS, **settings):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    side = _side_info(config, losses, bounds, tokens, **settings)
    return model(tokens, positions, None, labels=tokens, packed_seq_params=side)


def _qkv():
    g = torch.Generator().manual_seed(1)
    shapes = [(S, B, 6, 8), (S, B, 2, 8), (S, B, 2, 8)]
    return [torch.randn(s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes]


def _smooth_l1(x):
    return torch.where(x.abs() < 1, 0.5 * x.square(), x.abs() - 0.5)


@pytest.fixture
def core(tiny_config, single_process_groups):
    """Returns `core(kind, **overrides)`: the first layer's core attention, and its config."""

    def make(**overrides):
        config = tiny_config(**overrides)
        (model,) = build_model(config, single_process_groups)
        return model.decoder.layers[0].self_attention.core_attention, config

    return make


@pytest.mark.parametrize("is_dense", [False, True])
def test_alignment_and_its_gradients_are_those_of_both_outputs_written_out(core, is_dense):
    attention, config = core(**ALIGNED)
    dense, _ = core(attention__kind=AttentionKind.dense)
    assert type(attention) is PHSACoreAttention and type(dense) is DenseCoreAttention
    inputs, losses = _qkv(), AddedLosses.of(config)
    out = attention(*inputs, None, packed_seq_params=_side_info(config, losses, is_dense=is_dense))
    sparse = attention(*inputs, None, packed_seq_params=_side_info(config))
    full = dense(*inputs, None, packed_seq_params=_side_info(config))
    assert torch.equal(out, full if is_dense else sparse)
    # Smooth L1 pulls the full output to the sparse one and the sparse one to the full one: mean over 48
    # features and 2 layers, a sum over tokens.
    to_sparse = _smooth_l1(full - sparse.detach()).sum() / (48 * 2)
    to_full = _smooth_l1(sparse - full.detach()).sum() / (48 * 2)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, upstream)
    total = ((full if is_dense else sparse) * upstream).sum() + 10.0 * (to_sparse + to_full)
    expected = torch.autograd.grad(total, inputs, retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert losses.names == [ALIGN]
    torch.testing.assert_close(losses.sums(out.device)[0], (to_sparse + to_full).detach(), rtol=1e-12, atol=0)
    one_way = torch.autograd.grad(total - 10.0 * to_full, inputs)
    assert not torch.allclose(one_way[0], found[0], rtol=1e-3)


def test_index_loss_and_its_gradients_are_those_of_block_masses_written_out(
    tiny_config, single_process_groups
):
    """A whole model in fp64: its loss plus the KL of probabilities written out, by autograd."""
    config = tiny_config(**INDEXED, model__num_layers=1)
    (model,) = build_model(config, single_process_groups)
    model, losses = model.double(), AddedLosses.of(config)
    core = model.decoder.layers[0].self_attention.core_attention
    seen = {}
    core.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(qkv=args[:3], side=kwargs["packed_seq_params"]), with_kwargs=True
    )
    nats = _forward(model, config, losses).sum()
    weights = dict(model.named_parameters())
    found = dict(zip(weights, torch.autograd.grad(nats, weights.values(), retain_graph=True), strict=True))
    q, k, _ = (x.detach() for x in seen["qkv"])
    index = core._index(seen["side"])
    m, total = 4, torch.zeros((), dtype=torch.float64)
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        first_row = sum((b - a) // m for a, b in zip(BOUNDS, BOUNDS[1:], strict=False) if b <= start)
        for i in range(start, end):
            candidates = list(range(1, (i - start) // m - 1))
            for head in range(2 if len(candidates) > 1 else 0):
                keys = k.transpose(0, 1).reshape(-1, 2, 8)[start : i + 1, head]
                queries = q.transpose(0, 1).reshape(-1, 6, 8)[i, head * 3 : head * 3 + 3]
                mass = (queries @ keys.T * 8**-0.5).softmax(-1).sum(0)
                target = torch.stack([mass[b * m : (b + 1) * m].sum() for b in candidates])
                target = target / target.sum()
                dots = index.query[i, head] @ index.key[[first_row + b for b in candidates], head].T
                scores = index.weight[i, head] @ dots.relu() / (4 * 8) ** 0.5
                total = total + (target * (target.log() - scores.log_softmax(0))).sum() / 2
    torch.testing.assert_close(losses.sums(q.device)[0], total.detach(), rtol=1e-10, atol=0)
    plain = _forward(model, config).sum()
    assert plain == nats
    expected = torch.autograd.grad(plain + 3.0 * total, weights.values(), allow_unused=True)
    alone = torch.autograd.grad(_forward(model, config).sum(), weights.values(), allow_unused=True)
    for (name, one), other, without in zip(found.items(), expected, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12, msg=name)
        # The loss trains the indexer alone, and nothing else trains it.
        assert (without is None) == (".core_attention." in name), name
        assert one.abs().max() > 0, name


def test_the_index_is_linear_in_the_layers_input_and_turned_by_rope(tiny_config, single_process_groups):
    """Index queries at their token, mean keys at the first token of their block: head by head."""
    config = tiny_config(**INDEXED, model__num_layers=1)
    (model,) = build_model(config, single_process_groups)
    core, d, m = model.decoder.layers[0].self_attention.core_attention.double(), 8, 4
    hidden = torch.randn(S, B, 48, dtype=torch.float64, requires_grad=True)
    angles = torch.outer(torch.arange(S), 10000.0 ** (-torch.arange(0, d, 2) / d)).double()
    side = _side_info(config)
    side.layer_input = LayerInput(hidden, torch.cat([angles, angles], 1)[:, None, None])
    index = core._index(side)

    def turned(x, position):
        pairs = torch.complex(x[: d // 2], x[d // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles[position]), angles[position])
        return torch.cat([pairs.real, pairs.imag])

    flat = hidden.detach().transpose(0, 1).flatten(0, 1)
    for token in (0, 6, 63, 64, 101):
        for head in range(2):
            for j in range(4):
                rows = slice((head * 4 + j) * d, (head * 4 + j + 1) * d)
                expected = turned(core.linear_query.weight[rows] @ flat[token], token % S)
                torch.testing.assert_close(index.query[token, head, j], expected, rtol=1e-12, atol=1e-14)
            weight = core.linear_weight.weight[head * 4 : (head + 1) * 4] @ flat[token]
            torch.testing.assert_close(index.weight[token, head], weight, rtol=1e-12, atol=1e-14)
    row = 0
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        for b in range((end - start) // m):
            first = start + b * m
            for head in range(2):
                mean = core.linear_key.weight[head * d : (head + 1) * d] @ flat[first : first + m].mean(0)
                expected = turned(mean, first % S)
                torch.testing.assert_close(index.key[row, head], expected, rtol=1e-12, atol=1e-14)
            row += 1
    assert row == 30 and index.key[row:].abs().sum() == 0
    sums = sum(x.sum() for x in index)
    (gradient,) = torch.autograd.grad(sums, hidden, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("settings", [ALIGNED, INDEXED])
@pytest.mark.parametrize("recompute", [Recompute.full, Recompute.selective])
def test_recomputation_changes_neither_losses_nor_gradients(
    tiny_config, single_process_groups, settings, recompute
):
    found = []
    for how in (Recompute.none, recompute):
        config = tiny_config(**settings, parallel__recompute=how, model__mtp_num_layers=1)
        torch.manual_seed(3)
        (model,) = build_model(config, single_process_groups)
        losses = AddedLosses.of(config)
        _forward(model, config, losses).sum().backward()
        found.append((losses.sums(torch.device("cpu")), *(p.grad for p in model.parameters())))
    assert found[0][0] > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_index_scores_of_packed_documents_are_those_alone(tiny_config, single_process_groups):
    config = tiny_config(**INDEXED)
    (model,) = build_model(config, single_process_groups)
    model = model.double()
    tokens = TOKENS[:1]
    kinds = []
    for bounds in ([[0, 21, S]], [[0, 21], [0, S - 21]]):
        losses, first = AddedLosses.of(config), 0
        parts = []
        for b in bounds:
            parts.append(_forward(model, config, losses, tokens[:, first : first + b[-1]], b))
            first += b[-1]
        kinds.append((losses.sums(torch.device("cpu")), torch.cat(parts, 1)))
    # RoPE goes on at the second document, with angles in fp32: up to 64 radians, each off by up to 2^-18.
    torch.testing.assert_close(kinds[0][0], kinds[1][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(kinds[0][1], kinds[1][1], rtol=1e-5, atol=1e-5)


def test_a_pass_without_gradients_collects_nothing_and_a_plain_recipe_has_no_losses(
    tiny_config, single_process_groups
):
    assert AddedLosses.of(tiny_config()) is None
    for settings in (ALIGNED, INDEXED):
        config = tiny_config(**settings)
        (model,) = build_model(config, single_process_groups)
        losses = AddedLosses.of(config)
        with torch.no_grad():
            _forward(model, config, losses)
        assert losses.sums(torch.device("cpu")).tolist() == [0.0]
        assert losses.names == [ALIGN if "attention__align_coeff" in settings else INDEX]
