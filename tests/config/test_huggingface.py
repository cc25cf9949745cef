"""config.json in the forms of transformers 4.x and 5.x, and what is refused."""

from pathlib import Path

import pytest

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.huggingface import eos_id_of, huggingface_config, model_settings
from phsa_megatron.config.schema import Dtype, ModelConfig

HERE = Path("models/some")
# As Qwen3-0.6B's config.json was published, with transformers 4.51.
OLD = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0P6B = {
    "num_layers": 28,
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_query_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_embeddings": True,
    "qk_norm": True,
    "rope_base": 1e6,
    "norm_eps": 1e-6,
    "num_experts": 0,
}


def new_form(**rope):
    kept = {name: value for name, value in OLD.items() if name not in ("rope_theta", "rope_scaling")}
    return kept | {"rope_parameters": rope, "layer_types": ["full_attention"] * 28}


@pytest.mark.parametrize(
    "theirs",
    [
        OLD,
        OLD | {"rope_scaling": {"type": "default"}},
        new_form(rope_type="default", rope_theta=1e6),
        new_form(full_attention={"rope_type": "default", "rope_theta": 1e6}),
        {name: value for name, value in OLD.items() if name != "head_dim"},  # the class's default
    ],
    ids=["4.x", "4.x default", "5.x", "5.x by layer", "no head_dim"],
)
def test_both_forms_describe_the_same_model(theirs):
    assert model_settings(theirs, HERE) == QWEN3_0P6B


def test_a_llama_may_leave_out_what_its_class_assumes():
    theirs = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    found = model_settings(theirs, HERE)
    assert (found["num_kv_heads"], found["head_dim"], found["qk_norm"]) == (8, 8, False)
    assert (found["rope_base"], found["tie_embeddings"], found["norm_eps"]) == (1e4, False, 1e-6)
    with pytest.raises(ConfigError, match="lacks num_attention_heads"):
        model_settings({k: v for k, v in theirs.items() if k != "num_attention_heads"}, HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "RoPE scaling"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "RoPE scaling"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4096, "use_sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma3"}, "model_type is 'gemma3'"),
    ],
)
def test_parts_that_are_not_built_here_are_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        model_settings(OLD | changes, HERE)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_what_is_written_is_read_back_in_either_form(qk_norm):
    model = ModelConfig(name="x", init_std=0.02, **(QWEN3_0P6B | {"qk_norm": qk_norm}))
    written = huggingface_config(model, Dtype.bf16, 4096, 7)
    expected = QWEN3_0P6B | {"qk_norm": qk_norm}
    assert model_settings(written, HERE) == expected
    for form in ("rope_theta", "rope_parameters"):  # each alone: one of them is what a version reads
        assert model_settings({k: v for k, v in written.items() if k != form}, HERE) == expected
    assert (written["dtype"], written["torch_dtype"], eos_id_of(written)) == ("bfloat16", "bfloat16", 7)


@pytest.mark.parametrize(("field", "value"), [("num_experts", 4), ("mtp_num_layers", 1)])
def test_parts_without_a_counterpart_are_not_exported(field, value):
    model = ModelConfig(name="x", **(QWEN3_0P6B | {field: value}))
    with pytest.raises(ConfigError, match=f"model.{field}={value}"):
        huggingface_config(model, Dtype.bf16, 4096, None)


def test_the_first_of_several_end_tokens_ends_documents():
    assert eos_id_of({"eos_token_id": [151645, 151643]}) == 151645
    assert eos_id_of({"eos_token_id": None}) is None
