import pytest
import torch

from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.config.flops import count_parameters
from phsa_megatron.config.schema import AttentionKind, Dtype, Selector
from phsa_megatron.model.factory import build_model
from phsa_megatron.model.norm import RMSNorm


def _expected_parameters(config):
    """Counts a Qwen3-shaped decoder from its matrices."""
    m = config.model
    multiple = m.vocab_pad_multiple * config.parallel.tensor_size
    rows = (m.vocab_size + multiple - 1) // multiple * multiple
    q, kv = m.num_query_heads * m.head_dim, m.num_kv_heads * m.head_dim
    attention = m.hidden_size * (q + 2 * kv) + q * m.hidden_size + (2 * m.head_dim if m.qk_norm else 0)
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    total = rows * m.hidden_size * (1 if m.tie_embeddings else 2) + m.num_layers * layer + m.hidden_size
    return total + m.mtp_num_layers * (layer + 2 * m.hidden_size * m.hidden_size + 3 * m.hidden_size)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__tie_embeddings": False},
        {"model__qk_norm": False},
        {"model__mtp_num_layers": 2},
        {"model__mtp_num_layers": 1, "model__tie_embeddings": False},
        {"model__num_query_heads": 2, "model__vocab_size": 96},
        {"attention__kind": AttentionKind.dense},
    ],
)
def test_parameter_count_equals_the_formula(tiny_config, single_process_groups, overrides):
    config = tiny_config(**overrides)
    (model,) = build_model(config, single_process_groups)
    assert sum(p.numel() for p in model.parameters()) == _expected_parameters(config)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(AttentionKind.phsa, PHSACoreAttention), (AttentionKind.dense, DenseCoreAttention)],
)
def test_every_layer_has_our_attention_and_our_norms(tiny_config, single_process_groups, kind, expected):
    config = tiny_config(attention__kind=kind, model__mtp_num_layers=2)
    (model,) = build_model(config, single_process_groups)
    cores = [m for m in model.modules() if hasattr(m, "mtp_depth")]
    assert [type(core) for core in cores] == [expected] * 4
    assert [core.mtp_depth for core in cores] == [0, 0, 1, 2]
    norms = [type(m) for name, m in model.named_modules() if "norm" in name and list(m.parameters())]
    assert set(norms) == {RMSNorm} and len(norms) == 4 * 4 + 1 + 2 * 3


def test_attention_adds_no_parameters_so_dense_and_phsa_checkpoints_fit(tiny_config, single_process_groups):
    phsa, dense = (
        build_model(tiny_config(attention__kind=kind), single_process_groups)[0] for kind in AttentionKind
    )
    assert phsa.state_dict().keys() == dense.state_dict().keys()


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("selector", [Selector.nsa, Selector.indexer])
def test_weights_of_a_selector_are_counted(tiny_config, single_process_groups, selector, qk_norm):
    config = tiny_config(
        attention__selector=selector,
        attention__nsa_window_tokens=8,
        attention__indexer_heads=3,
        model__mtp_num_layers=1,
        model__qk_norm=qk_norm,
    )
    (model,) = build_model(config, single_process_groups)
    counted = count_parameters(config.model, 112, config.attention)
    assert sum(p.numel() for p in model.parameters()) == counted.total
    plain = count_parameters(config.model, 112)
    own = sum(p.numel() for name, p in model.named_parameters() if ".core_attention." in name)
    assert own == counted.total - plain.total > 0


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_share_one_gradient(tiny_config, single_process_groups, micro_batch, tied):
    config = tiny_config(model__tie_embeddings=tied)
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 64])
    # Token 99 is never read, so that only the output layer can move its row.
    batch.tokens.clamp_(max=98)
    loss = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.tokens.roll(-1, 1),
        packed_seq_params=batch.side_info(config),
    )
    loss.sum().backward()
    read = model.embedding.word_embeddings.weight.grad
    assert bool(read[99].abs().sum() > 0) is tied
    assert ("output_layer.weight" in dict(model.named_parameters())) is not tied


def test_seed_decides_the_weights(tiny_config, single_process_groups):
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        (model,) = build_model(tiny_config(), single_process_groups)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_initial_weights_have_the_std_of_the_recipe(tiny_config, single_process_groups):
    config = tiny_config(model__init_std=0.05)
    (model,) = build_model(config, single_process_groups)
    weight = model.embedding.word_embeddings.weight
    # The sample std of n values is off by 1/sqrt(2n): five of those.
    assert weight.std().item() == pytest.approx(0.05, rel=5 / (2 * weight.numel()) ** 0.5)


def test_bf16_model_computes_in_bf16_and_returns_fp32(tiny_config, single_process_groups, micro_batch):
    config = tiny_config(run__dtype=Dtype.bf16)
    (model,) = build_model(config, single_process_groups)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = micro_batch([0, 20, 64])
    logits = model(batch.tokens, batch.positions, None, packed_seq_params=batch.side_info(config))
    assert logits.dtype == torch.float32 and logits.shape == (1, 64, 112)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1), (16, 1)])
def test_every_group_size_trains(tiny_config, single_process_groups, micro_batch, heads):
    config = tiny_config(model__num_query_heads=heads[0], model__num_kv_heads=heads[1])
    (model,) = build_model(config, single_process_groups)
    batch = micro_batch([0, 30, 64, 128, 128], rows=2)
    loss = model(
        batch.tokens,
        batch.positions,
        None,
        labels=batch.tokens.roll(-1, 1),
        packed_seq_params=batch.side_info(config),
    )
    assert loss.shape == (2, 64)
    loss.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
