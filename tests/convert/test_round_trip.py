"""A folder of transformers to a checkpoint and back: the same bits, the same logits, the same settings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from phsa_megatron.config import compose
from phsa_megatron.config.errors import CheckpointError, ConfigError, DeviceError
from phsa_megatron.config.huggingface import model_settings
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Dtype
from phsa_megatron.convert import compare_logits, export_hf, import_hf
from phsa_megatron.convert.checkpoint_weights import settings_of
from phsa_megatron.convert.phsa_entry import phsa_entry, read_phsa_entry
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training.weights import find_checkpoint
from tests.convert.conftest import EOD, TINY_PHSA

BF16 = torch.bfloat16
MODELS = [("qwen3", True, BF16), ("qwen3", False, torch.float32), ("llama", True, BF16)]


def tensors_of(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def import_run(folder, run, *arguments):
    assert import_hf.main([str(folder), str(run), *TINY_PHSA, *arguments]) == 0
    return run


@pytest.fixture(scope="module")
def run(model_folder, tmp_path_factory):
    """An imported run, for tests that only read it."""
    return import_run(model_folder("qwen3"), tmp_path_factory.mktemp("runs") / "ours", "--no-compare")


@pytest.mark.parametrize(("kind", "tied", "dtype"), MODELS)
def test_a_folder_comes_back_bit_by_bit_and_with_its_logits(
    model_folder, tmp_path, capsys, kind, tied, dtype
):
    theirs = model_folder(kind, tied, dtype)
    import_run(theirs, tmp_path / "run")
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "ours"), "--max-file-gib", "1e-5"]) == 0
    before, after = tensors_of(theirs), tensors_of(tmp_path / "ours")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    files = list((tmp_path / "ours").glob("*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"]) == set(after)
    printed = capsys.readouterr().out
    # Import and export each compare dense attention and PHSA; the command fails on anything but rounding.
    assert printed.count("dense attention: largest difference") == 2
    assert printed.count("phsa with k = 2: largest difference") == 2
    settings = [json.loads((f / "config.json").read_text()) for f in (theirs, tmp_path / "ours")]
    assert model_settings(settings[0], theirs) == model_settings(settings[1], theirs)


def test_phsa_of_transformers_is_that_of_megatron_and_not_dense(run, model_folder, tokenizer_file):
    checkpoint = find_checkpoint(RunFolder(run), None)
    config = settings_of(checkpoint)
    table = import_hf._table(model_folder("qwen3"), config)
    dense, sparse = compare_logits.compare_logits(checkpoint, config, model_folder("qwen3"), table)
    # fp32, sums of up to 150 products in two layers: far below what another selection would leave.
    assert dense.largest < 1e-5 * dense.scale
    assert sparse.largest < 1e-5 * sparse.scale
    tokens = compare_logits._tokens(config.attention, config.model.vocab_size, table, 0)
    one = compare_logits.on_one_cpu(config, Dtype.fp32)
    dense_logits, sparse_logits = compare_logits._megatron(checkpoint, one, table, tokens, [True, False])
    assert (dense_logits - sparse_logits).abs().max() > 0.05 * dense.scale
    one.attention.mean_weight_frac = 1.0  # and punctuation matters for what is selected
    mean_logits = compare_logits._megatron(checkpoint, one, table, tokens, [False])[0]
    assert (mean_logits - sparse_logits).abs().max() > 0.01 * dense.scale


def test_two_heads_that_change_places_are_noticed(run, model_folder, tmp_path):
    folder = tmp_path / "swapped"
    shutil.copytree(model_folder("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.cat([query[16:32], query[:16], query[32:]])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = find_checkpoint(RunFolder(run), None)
    config = settings_of(checkpoint)
    with pytest.raises(CheckpointError, match="not the same model"):
        compare_logits.compare_logits(checkpoint, config, folder, import_hf._table(folder, config))


def test_the_imported_run_has_the_settings_of_the_folder_and_the_given_ones(model_folder, tmp_path):
    run = import_run(
        model_folder("llama", dtype=BF16),
        tmp_path / "run",
        "--no-compare",
        "attention.infer_topk=3",
        "parallel.tensor_size=2",
        "cluster.processes_per_node=2",
    )
    config = compose.load(run / "config.yaml")
    assert (config.run.dtype, config.model.qk_norm, config.model.rope_base) == (Dtype.bf16, False, 5e5)
    assert (config.attention.infer_topk, config.parallel.tensor_size) == (3, 2)
    assert (config.data.eod_token, config.data.seq_len_tokens) == (EOD, 256)
    assert RunFolder(run).committed_steps() == [0]


def test_a_recipe_gives_what_a_run_needs_and_the_folder_is_the_one_that_was_named(model_folder, tmp_path):
    folder = model_folder("qwen3")
    recipe = ["recipe=phsa_demo_cpu", f"data.tokenizer_file={folder}/tokenizer.json"]
    model = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_query_heads": 4,
             "num_kv_heads": 2, "head_dim": 16, "vocab_size": 90, "rope_base": 5e5}  # fmt: skip
    overrides = [*recipe, *(f"model.{name}={value}" for name, value in model.items())]
    config = import_hf.run_settings(folder, tmp_path / "mine", overrides)
    assert RunFolder.of(config).path == tmp_path / "mine"
    assert (config.run.train_steps, config.attention.local_tokens) == (350, 64)
    with pytest.raises(ConfigError, match="model.num_layers"):  # the recipe's model is another one
        import_hf.run_settings(folder, tmp_path / "mine", recipe)
    with pytest.raises(ConfigError, match="second argument"):
        import_hf.run_settings(folder, tmp_path / "mine", [*overrides, "run.name=other"])


def test_exported_settings_and_punctuation_return_at_import(run, tmp_path, capsys):
    export_hf.main([str(run), str(tmp_path / "ours"), "--no-compare"])
    assert "not compared" in capsys.readouterr().out
    entry = json.loads((tmp_path / "ours" / "config.json").read_text())["phsa"]
    assert entry["source"] == {"run": "ours", "step": 0}
    attention, table = read_phsa_entry(entry, "here")
    assert attention == compose.load(run / "config.yaml").attention
    assert int(table.is_punctuation.sum()) == 10
    import_hf.main([str(tmp_path / "ours"), str(tmp_path / "again"), "--no-compare"])
    assert compose.load(tmp_path / "again" / "config.yaml").attention == attention
    # Another tokenizer has another set: the model must not run with it.
    text = (tmp_path / "ours" / "tokenizer.json").read_text().replace('"!"', '"wow"')
    (tmp_path / "ours" / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="its punctuation set is exact-en"):
        import_hf.main([str(tmp_path / "ours"), str(tmp_path / "third"), "--no-compare"])


def test_a_changed_punctuation_set_does_not_pass_for_the_one_that_is_named(tokenizer_file):
    from phsa_megatron.attention.punctuation import table_of
    from phsa_megatron.config.schema import AttentionConfig

    attention = AttentionConfig(infer_topk=4, dense_layers=[2])
    table = table_of(Tokenizer.from_file(tokenizer_file, EOD).decoded_tokens(), attention)
    entry = json.loads(json.dumps(phsa_entry(attention, table)))
    found, again = read_phsa_entry(entry, "here")
    assert found == attention and again.sha256 == table.sha256
    entry["punctuation"]["ids"].append(50)
    with pytest.raises(ConfigError, match="changed by hand"):
        read_phsa_entry(entry, "here")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_phsa_entry(entry | {"attention": {"lambda": 1}}, "here")
    with pytest.raises(ConfigError, match="version 2"):
        read_phsa_entry(entry | {"version": 2}, "here")


def test_an_imported_checkpoint_starts_stages_but_is_not_resumed(run, tmp_path):
    from phsa_megatron.training import stages
    from tests.training.checkpoint_runs import Run

    config = compose.load(run / "config.yaml")
    config.run.name, config.run.root_dir, config.run.init_from = "stage", str(tmp_path), str(run)
    with Run(config) as stage:
        assert stages.init_from(config, stage.parts, stage.checkpointer).step == 0
        with pytest.raises(CheckpointError, match="weights and no optimizer"):
            stage.checkpointer.load_from(find_checkpoint(RunFolder(run), 0), stage.parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.num_layers=3"], "model.num_layers: 3 here, 2 there"),
        (["run.dtype=bf16"], "would be rounded"),
        (["attention.local_tokens=6"], "windows are whole blocks"),
    ],
)
def test_what_contradicts_the_folder_or_a_rule_is_refused(model_folder, tmp_path, arguments, message):
    overrides = [text for text in TINY_PHSA if text.split("=")[0] != arguments[0].split("=")[0]]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_hf.main(
            [str(model_folder("qwen3")), str(tmp_path / "x"), "--no-compare", *overrides, *arguments]
        )
    assert not (tmp_path / "x").exists()


def test_another_tokenizer_than_the_trained_one_is_not_exported(run, tmp_path, tokenizer_file):
    other = tmp_path / "other.json"
    other.write_text(tokenizer_file.read_text().replace('"!"', '"wow"'))
    with pytest.raises(CheckpointError, match="was trained with"):
        export_hf.main([str(run), str(tmp_path / "x"), "--no-compare", "--tokenizer", str(other)])


def test_nothing_is_overwritten_and_a_missing_step_is_named(run, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf.main([str(run), str(tmp_path), "--no-compare"])
    with pytest.raises(CheckpointError, match="no committed checkpoint of step 7; it has: 0"):
        export_hf.main([str(run), str(tmp_path / "x"), "--no-compare", "--step", "7"])


def test_without_transformers_the_comparison_is_refused_before_anything_is_written(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(compare_logits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="--no-compare"):
        export_hf.main([str(run), str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
