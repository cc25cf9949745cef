"""Experts: counted, drawn each for itself, and balanced with the weight of the recipe."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from phsa_megatron.config.flops import count_parameters, padded_vocab_size
from phsa_megatron.model.experts import draw_expert_weights
from phsa_megatron.model.factory import build_model

EXPERTS = {"model__num_experts": 4, "model__expert_topk": 2}


def _expert_weights(model):
    return {
        (layer.layer_number, expert, name): parameter.detach().clone()
        for layer in (block.mlp for block in model.decoder.layers)
        for expert, mlp in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True)
        for name, parameter in mlp.named_parameters()
    }


def test_every_expert_is_another_and_the_std_is_that_of_the_recipe(tiny_config, single_process_groups):
    config = tiny_config(**EXPERTS, model__init_std=0.05)
    (model,) = build_model(config, single_process_groups)
    weights = _expert_weights(model)
    assert len(weights) == 2 * 4 * 2, "layers x experts x matrices"
    for one, other in itertools.combinations(weights.values(), 2):
        assert one.shape != other.shape or not torch.equal(one, other)
    everything = torch.cat([w.flatten() for (_, _, name), w in weights.items() if "fc1" in name])
    assert everything.std().item() == pytest.approx(0.05, rel=5 / (2 * everything.numel()) ** 0.5)


def test_an_expert_starts_alike_on_whichever_process_it_is(tiny_config, single_process_groups):
    (model,) = build_model(tiny_config(**EXPERTS), single_process_groups)
    expected = _expert_weights(model)
    layer = model.decoder.layers[0].mlp
    # The second of two expert-parallel processes, as far as the drawing sees it.
    halves = SimpleNamespace(local_experts=layer.experts.local_experts[2:])
    half = type(layer).__new__(type(layer))
    torch.nn.Module.__init__(half)
    half.layer_number, half.local_expert_indices, half.config = 1, [2, 3], layer.config
    object.__setattr__(half, "experts", halves)
    for mlp in halves.local_experts:
        torch.nn.init.zeros_(mlp.linear_fc1.weight)
    draw_expert_weights(SimpleNamespace(named_modules=lambda: [("decoder.layers.0.mlp", half)]), 1234)
    found = _expert_weights(model)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_parameters_are_those_that_are_counted(tiny_config, single_process_groups):
    config = tiny_config(**EXPERTS, model__tie_embeddings=False)
    (model,) = build_model(config, single_process_groups)
    counted = count_parameters(config.model, padded_vocab_size(config.model, 1))
    assert sum(p.numel() for p in model.parameters()) == counted.total
    dense = tiny_config(model__ffn_hidden_size=2 * config.model.ffn_hidden_size, model__tie_embeddings=False)
    # Two of four experts multiply a token, like one MLP of twice the width, and the router.
    linear = count_parameters(dense.model, 112).active_in_products + 2 * 4 * config.model.hidden_size
    assert counted.active_in_products == linear


def test_balance_weighs_on_the_router_only_if_asked(tiny_config, single_process_groups, micro_batch):
    batch = micro_batch([0, 20, 64])
    gradients = []
    for coeff in (0.0, 1e-3, 1e-2):
        torch.manual_seed(0)
        config = tiny_config(**EXPERTS, model__expert_balance_coeff=coeff)
        (model,) = build_model(config, single_process_groups)
        out = model(
            batch.tokens,
            batch.positions,
            None,
            labels=batch.tokens.roll(-1, 1),
            packed_seq_params=batch.side_info(config),
        )
        out.sum().backward()
        gradients.append(model.decoder.layers[-1].mlp.router.weight.grad)
    small, large = gradients[1] - gradients[0], gradients[2] - gradients[0]
    assert small.abs().max() > 0
    torch.testing.assert_close(large, 10 * small, rtol=1e-3, atol=1e-5 * large.abs().max().item())
