import pytest

from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.spec import layer_spec
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionKind


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
