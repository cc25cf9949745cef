import sys
import types

import pytest
from megatron.core.models.gpt import gpt_layer_specs

from phsa_megatron.attention import spec as spec_module
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.spec import layer_spec
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import AttentionKind, Elementwise, Fp8, Layers
from phsa_megatron.model import factory
from phsa_megatron.model.norm import RMSNorm
from phsa_megatron.model.transformer_config import transformer_config


@pytest.mark.parametrize(
    ("kind", "module"),
    [(AttentionKind.phsa, PHSACoreAttention), (AttentionKind.dense, DenseCoreAttention)],
)
def test_the_layer_has_the_core_attention_of_the_recipe(tiny_config, kind, module):
    config = tiny_config(attention__kind=kind)
    core = layer_spec(config, mtp_depth=2).submodules.self_attention.submodules.core_attention
    assert core.module is module
    assert core.params == {
        "attention": config.attention,
        "parallel": config.parallel,
        "mtp_depth": 2,
    }


def test_splitting_the_heads_that_select_together_is_refused(tiny_config):
    with pytest.raises(
        ConfigError, match="model.num_kv_heads=2 must be a multiple of parallel.tensor_size=4"
    ):
        layer_spec(tiny_config(parallel__tensor_size=4))


class _EngineProvider:
    """Answers as megatron's provider of Transformer Engine's modules does, with names in their place."""

    def __getattr__(self, kind):
        return lambda *_, **__: types.new_class(f"TE_{kind}")

    def fuse_layernorm_and_linear(self):
        return True


@pytest.fixture
def with_engine(monkeypatch):
    """Lets megatron build Transformer Engine's spec where that library is not installed."""
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", _EngineProvider, raising=False)


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_transformer_engines_layer_has_our_attention_and_its_own_norms(tiny_config, with_engine, kind):
    config = tiny_config(compute__layers=Layers.transformer_engine, attention__kind=kind)
    layer = factory._layer(config).submodules
    attention = layer.self_attention.submodules
    assert attention.core_attention.module is spec_module._CORE_ATTENTION[kind]
    assert attention.core_attention.params["attention"] is config.attention
    assert attention.linear_qkv.__name__ == "TE_column_parallel_layer_norm_linear"
    assert attention.linear_proj.__name__ == "TE_row_parallel_linear"
    assert attention.q_layernorm.__name__ == attention.k_layernorm.__name__ == "TE_layer_norm"
    assert RMSNorm not in (layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm)


def test_transformer_engine_is_refused_where_it_is_absent(tiny_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(DeviceError, match="compute.layers=transformer_engine asks for transformer_engine"):
        layer_spec(tiny_config(compute__layers=Layers.transformer_engine))


@pytest.mark.parametrize("recipe", [recipe for recipe in Fp8 if recipe != Fp8.none])
def test_fp8_is_megatrons_recipe_of_that_name(tiny_config, recipe):
    found = transformer_config(tiny_config(compute__layers=Layers.transformer_engine, compute__fp8=recipe))
    assert (found.fp8, found.fp8_recipe) == ("hybrid", recipe.value)
    assert transformer_config(tiny_config()).fp8 is None


def test_compiled_parts_and_fused_gradients_are_megatrons_switches(tiny_config, monkeypatch):
    plain = transformer_config(tiny_config())
    assert not (plain.bias_activation_fusion or plain.apply_rope_fusion or plain.gradient_accumulation_fusion)
    compiled = transformer_config(tiny_config(compute__elementwise=Elementwise.compiled))
    assert compiled.bias_activation_fusion and compiled.apply_rope_fusion

    name, asked = "fused_weight_gradient_mlp_cuda", tiny_config(compute__fused_weight_gradient=True)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match=f"compute.fused_weight_gradient=true asks for {name}"):
        transformer_config(asked)
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert transformer_config(asked).gradient_accumulation_fusion
