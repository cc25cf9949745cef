import pytest
import torch

from phsa_megatron.config.schema import Dtype, Recompute
from phsa_megatron.model.transformer_config import transformer_config


def test_shape_and_numerics_follow_the_recipe(tiny_config):
    found = transformer_config(tiny_config(model__init_std=0.03, model__norm_eps=1e-5))
    assert (found.num_layers, found.hidden_size, found.ffn_hidden_size) == (2, 48, 64)
    assert (found.num_attention_heads, found.num_query_groups, found.kv_channels) == (6, 2, 8)
    assert (found.init_method_std, found.layernorm_epsilon) == (0.03, 1e-5)
    assert found.calculate_per_token_loss and found.use_cpu_initialization
    assert found.hidden_dropout == found.attention_dropout == 0.0
    assert found.mtp_num_layers is None


@pytest.mark.parametrize(("dtype", "expected"), [(Dtype.fp32, torch.float32), (Dtype.bf16, torch.bfloat16)])
def test_one_dtype_for_weights_and_for_what_stages_send(tiny_config, dtype, expected):
    found = transformer_config(tiny_config(run__dtype=dtype, parallel__pipeline_size=2))
    assert found.params_dtype == found.pipeline_dtype == expected
    assert found.bf16 is (expected == torch.bfloat16)


def test_virtual_stages_never_use_batched_sends(tiny_config):
    """PP 2 x VPP 2 with batched sends computes wrong numbers without an error."""
    found = transformer_config(
        tiny_config(model__num_layers=4, parallel__pipeline_size=2, parallel__virtual_pipeline_size=2)
    )
    assert found.overlap_p2p_comm and not found.batch_p2p_comm


@pytest.mark.parametrize(
    ("recompute", "granularity"),
    [(Recompute.none, None), (Recompute.selective, "selective"), (Recompute.full, "full")],
)
def test_recompute_is_the_one_asked_for(tiny_config, recompute, granularity):
    found = transformer_config(tiny_config(parallel__recompute=recompute))
    assert found.recompute_granularity == granularity
    if recompute == Recompute.selective:
        assert found.recompute_modules == ["core_attn"]
