"""A new stage from another run's weights or from a Hugging Face folder."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from phsa_megatron.config.errors import CheckpointError, ConfigError
from phsa_megatron.config.lineage import read_lineage
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionKind, Dtype, Selector
from phsa_megatron.model.huggingface_weights import join_qkv
from phsa_megatron.training import stages
from tests.training.checkpoint_runs import Run, fingerprint, tiny_config


def weights(parts):
    return {key: value for key, value in fingerprint(parts).items() if key.startswith("weight")}


def enter_stage(config):
    """The parts' weights after `init_from`, and the source."""
    with Run(config) as run:
        source = stages.init_from(config, run.parts, run.checkpointer)
        return weights(run.parts), source, fingerprint(run.parts)


@pytest.fixture
def first_stage(tmp_path):
    config = tiny_config(tmp_path, run={"name": "first", "dtype": Dtype.bf16})
    with Run(config) as run:
        for _ in range(2):
            run.train(1)
            run.save()
        return RunFolder.of(config), weights(run.parts)


def test_a_stage_takes_the_newest_weights_and_begins_everything_else_anew(tmp_path, first_stage):
    folder, expected = first_stage
    config = tiny_config(
        tmp_path,
        run={"name": "second", "dtype": Dtype.bf16, "init_from": str(folder.path), "seed": 99},
        data={"seq_len_tokens": 64},
        attention={"kind": AttentionKind.phsa},
    )
    found, source, everything = enter_stage(config)
    assert found == expected
    assert source.step == 2
    assert not any(key.startswith("exp_avg") for key in everything)
    assert everything["step 0"] == b"None"


INDEXER = {"kind": AttentionKind.phsa, "selector": Selector.indexer, "mean_weight_frac": 1.0}


def test_a_selector_with_weights_starts_them_anew_from_a_run_without_and_takes_them_from_its_own(
    tmp_path, first_stage
):
    def own(name):
        return ".core_attention." in name

    def stage(name, source, attention, seed):
        run = {"name": name, "dtype": Dtype.bf16, "init_from": str(source), "seed": seed}
        config = tiny_config(tmp_path, run=run, attention=attention)
        with Run(config) as entered:
            before = weights(entered.parts)
            stages.init_from(config, entered.parts, entered.checkpointer)
            after = weights(entered.parts)
            entered.save()
        return before, after, RunFolder.of(config).path

    folder, dense = first_stage
    before, second, source = stage("second", folder.path, INDEXER, 1)
    assert {k: v for k, v in second.items() if not own(k)} == dense
    fresh = {k: v for k, v in before.items() if own(k)}
    assert fresh and {k: v for k, v in second.items() if own(k)} == fresh
    before, third, _ = stage("third", source, INDEXER, 2)
    assert third == second and any(before[k] != third[k] for k in fresh)
    _, back, _ = stage("back", source, {"kind": AttentionKind.phsa}, 3)
    assert back == dense
    with pytest.raises(ConfigError, match="attention.indexer_heads: 4 -> 2"):
        stage("fewer", source, INDEXER | {"indexer_heads": 2}, 4)


def test_the_lineage_is_a_chain_with_steps_and_hashes_of_settings(tmp_path, first_stage):
    folder, _ = first_stage
    second = tiny_config(tmp_path, run={"name": "second", "dtype": Dtype.bf16, "init_from": str(folder.path)})
    with Run(second) as run:
        stages.init_from(second, run.parts, run.checkpointer)
        run.train(1)
        run.save()
    third = tiny_config(
        tmp_path, run={"name": "third", "dtype": Dtype.bf16, "init_from": str(RunFolder.of(second).path)}
    )
    enter_stage(third)
    chain = read_lineage(RunFolder.of(third).lineage_file)
    assert [(entry["init_from"], entry["step"]) for entry in chain] == [
        (str(RunFolder.of(second).path), 1),
        (str(folder.path), 2),
    ]
    assert all(len(entry["config_sha256"]) == 64 for entry in chain)
    assert chain[0]["config_sha256"] != chain[1]["config_sha256"]


def test_a_damaged_newest_checkpoint_of_the_source_is_passed_over(tmp_path, first_stage):
    folder, expected = first_stage
    os.truncate(folder.checkpoints_dir / "step_00000002" / "train_state.json", 3)
    config = tiny_config(tmp_path, run={"name": "second", "dtype": Dtype.bf16, "init_from": str(folder.path)})
    found, source, _ = enter_stage(config)
    assert source.step == 1
    assert found != expected
    assert read_lineage(RunFolder.of(config).lineage_file)[0]["step"] == 1


def test_another_shape_is_refused_with_the_fields(tmp_path, first_stage):
    folder, _ = first_stage
    config = tiny_config(
        tmp_path,
        run={"name": "second", "dtype": Dtype.bf16, "init_from": str(folder.path)},
        model={"ffn_hidden_size": 64, "num_layers": 3},
    )
    with Run(config) as run, pytest.raises(ConfigError) as error:
        stages.init_from(config, run.parts, run.checkpointer)
    assert "model.num_layers: 2 -> 3" in str(error.value)
    assert "model.ffn_hidden_size: 48 -> 64" in str(error.value)


def write_huggingface(folder, config, *, num_files=1, **changes):
    """A folder of random weights, written by hand: no library of theirs is needed to read it."""
    model = config.model
    generator = torch.Generator().manual_seed(3)
    kind = "qwen3" if model.qk_norm else "llama"

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    tensors = {
        "model.embed_tokens.weight": random(model.vocab_size, model.hidden_size),
        "model.norm.weight": 1 + random(model.hidden_size),
    }
    if not model.tie_embeddings:
        tensors["lm_head.weight"] = random(model.vocab_size, model.hidden_size)
    for i in range(model.num_layers):
        prefix = f"model.layers.{i}."
        width = model.num_query_heads * model.head_dim
        narrow = model.num_kv_heads * model.head_dim
        for name, shape in {
            "self_attn.q_proj": (width, model.hidden_size),
            "self_attn.k_proj": (narrow, model.hidden_size),
            "self_attn.v_proj": (narrow, model.hidden_size),
            "self_attn.o_proj": (model.hidden_size, width),
            "mlp.gate_proj": (model.ffn_hidden_size, model.hidden_size),
            "mlp.up_proj": (model.ffn_hidden_size, model.hidden_size),
            "mlp.down_proj": (model.hidden_size, model.ffn_hidden_size),
        }.items():
            tensors[f"{prefix}{name}.weight"] = random(*shape)
        norms = ["input_layernorm", "post_attention_layernorm"]
        for name in norms:
            tensors[f"{prefix}{name}.weight"] = 1 + random(model.hidden_size)
        if model.qk_norm:
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                tensors[f"{prefix}{name}.weight"] = 1 + random(model.head_dim)
    folder.mkdir()
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::num_files]}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: files[i % num_files] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = {
        "model_type": kind,
        "architectures": ["Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"],
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_query_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rope_base,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return tensors


def huggingface_config(tmp_path, **model):
    return tiny_config(tmp_path, run={"name": "stage", "init_from": str(tmp_path / "theirs")}, model=model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False], ids=["qwen3", "llama"])
def test_logits_equal_those_of_transformers(tmp_path, qk_norm, tied):
    transformers = pytest.importorskip("transformers", reason="the other implementation to compare with")
    config = huggingface_config(tmp_path, qk_norm=qk_norm, tie_embeddings=tied)
    write_huggingface(tmp_path / "theirs", config, num_files=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(0, config.model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    with Run(config) as run:
        before = logits(run, tokens)
        stages.init_from(config, run.parts, run.checkpointer)
        found = logits(run, tokens)
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    assert (before - expected).abs().max() / expected.abs().max() > 0.1


def logits(run, tokens):
    """Logits of the real vocabulary, [b, S, vocab]."""
    from phsa_megatron.attention.punctuation import PunctuationTable
    from phsa_megatron.attention.side_info import SideInfo

    rows, length = tokens.shape
    table = PunctuationTable(torch.zeros(run.config.model.vocab_size, dtype=torch.bool), "none", "0" * 64)
    boundaries = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    side_info = SideInfo.build(tokens, boundaries, table, run.config.attention, 1)
    positions = torch.arange(length).expand(rows, -1)
    with torch.no_grad():
        (module,) = run.parts.modules
        output = module(tokens, positions, None, packed_seq_params=side_info)
    return output[..., : run.config.model.vocab_size].float()


def test_query_key_and_value_are_interleaved_by_group(tmp_path):
    model = tiny_config(tmp_path).model  # 4 query heads, 2 groups, head width 8
    query = torch.arange(4).repeat_interleave(8)[:, None].float()
    key = 10 + torch.arange(2).repeat_interleave(8)[:, None].float()
    joined = join_qkv(query, key, key + 10, model)
    assert joined[::8, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 64}, "model.ffn_hidden_size: 48 here, 64 there"),
        ({"rope_theta": 10000.0}, "model.rope_base: 1000000.0 here, 10000.0 there"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE scaling"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"hidden_act": "gelu"}, "activation"),
    ],
)
def test_another_huggingface_model_is_refused_with_the_differing_fields(tmp_path, changes, message):
    config = huggingface_config(tmp_path)
    write_huggingface(tmp_path / "theirs", config, **changes)
    with Run(config) as run, pytest.raises(ConfigError, match=message):
        stages.init_from(config, run.parts, run.checkpointer)


def test_a_selectors_own_weights_are_no_part_of_a_huggingface_folder(tmp_path):
    config = huggingface_config(tmp_path)
    write_huggingface(tmp_path / "theirs", config)
    for key, value in INDEXER.items():
        setattr(config.attention, key, value)
    with Run(config) as run:
        before = weights(run.parts)
        stages.init_from(config, run.parts, run.checkpointer)
        after = weights(run.parts)
    kept = {key for key in before if before[key] == after[key]}
    assert kept == {key for key in before if ".core_attention." in key} and kept


def test_missing_unknown_and_damaged_tensors_are_named(tmp_path):
    config = huggingface_config(tmp_path)
    tensors = write_huggingface(tmp_path / "theirs", config)
    (path,) = (tmp_path / "theirs").glob("*.safetensors")
    with Run(config) as run:

        def enter():
            stages.init_from(config, run.parts, run.checkpointer)

        enter()
        save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}, path)
        with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
            enter()
        save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path)
        with pytest.raises(
            CheckpointError, match=r"no place for, such as model\.layers\.0\.self_attn\.q_proj\.bias"
        ):
            enter()
        save_file({**tensors, "model.norm.weight": torch.zeros(5)}, path)
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(5,\)"):
            enter()
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match="damaged"):
            enter()


def test_a_path_that_is_neither_is_refused(tmp_path):
    config = huggingface_config(tmp_path)
    with Run(config) as run, pytest.raises(ConfigError, match="neither a run folder"):
        stages.init_from(config, run.parts, run.checkpointer)
