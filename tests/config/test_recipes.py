import re
from pathlib import Path

import pytest

from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.derive import derive
from phsa_megatron.config.recipe_list import summary
from phsa_megatron.config.recipes_path import recipes_dir
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.validate import validate

RECIPES = options()["recipe"]
PRETRAIN = [name for name in RECIPES if "pretrain" in name]


def load(name: str, paper: list[str]) -> TrainConfig:
    return compose([f"recipe={name}", *(paper if name in PRETRAIN else [])]).config


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_breaks_no_rule(name, paper_overrides):
    config = load(name, paper_overrides)
    validate(config)
    assert config.run.name == name
    assert len(derive(config).equations()) > 15


def test_there_are_the_promised_recipes():
    names = {
        f"{a}_{s}_pretrain_8gpu_h100_bf16_{n}"
        for a in ("phsa", "dense")
        for s in ("0p6b", "8b")
        for n in ("4k", "32k")
    }
    assert set(RECIPES) == names | {"phsa_demo_cpu", "phsa_34m_claim_1gpu_h100_bf16_4k"}


@pytest.mark.parametrize("path", sorted(recipes_dir().rglob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_files_are_short_and_say_what_they_are(path):
    assert len(path.read_text().splitlines()) <= 40
    assert path.stem == "train" or summary(path)


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_recipes_have_the_papers_settings_and_mean_what_their_name_says(name, paper_overrides):
    config = load(name, paper_overrides)
    attention, size, _, gpus, *_, length = name.split("_")
    assert config.attention.kind == attention
    assert config.model.name == f"qwen3_{size}"
    assert f"{derive(config).world_size}gpu" == gpus
    assert config.cluster.peak_tflops == 989.0
    assert config.run.dtype == "bf16"
    assert config.data.seq_len_tokens == {"4k": 4096, "32k": 32768}[length]
    if attention == "phsa":
        windows = (config.attention.init_tokens, config.attention.local_tokens)
        assert windows == {"4k": (16, 128), "32k": (128, 512)}[length]
        assert config.attention.block_tokens == 16
        assert config.attention.train_topk == 2
        assert config.attention.mean_weight_frac == 0.5
    assert derive(config).memory.total_gib < config.cluster.memory_gib


@pytest.mark.parametrize("name", [n for n in PRETRAIN if n.startswith("phsa")])
def test_dense_recipes_differ_from_phsa_in_the_attention_only(name, paper_overrides):
    phsa, dense = (load(n, paper_overrides) for n in (name, name.replace("phsa_", "dense_")))
    dense.attention, dense.run.name = phsa.attention, phsa.run.name
    assert dense == phsa


def test_demo_recipe_has_the_promised_shape():
    config = compose(["recipe=phsa_demo_cpu"]).config
    attention = config.attention
    assert config.run.name == "phsa_demo_cpu"
    assert (config.cluster.device, config.run.dtype) == ("cpu", "fp32")
    assert (attention.kind, attention.punctuation_language) == ("phsa", "en_zh")
    assert (attention.block_tokens, attention.train_topk) == (16, 2)
    assert sorted(config.data.sources) == ["chinese", "english"]


def test_selection_leaves_blocks_out_for_at_least_half_of_the_demos_queries():
    config = compose(["recipe=phsa_demo_cpu"]).config
    attention, length = config.attention, config.data.seq_len_tokens
    m = attention.block_tokens

    def candidates(query: int) -> int:
        current = query // m
        outside_init = range(attention.init_tokens // m, current + 1)
        return sum(block <= current - attention.local_tokens // m for block in outside_init)

    choosing = sum(candidates(query) > attention.train_topk for query in range(length))
    assert choosing >= length / 2


def test_train_yaml_has_a_comment_for_every_group():
    lines = (recipes_dir() / "train.yaml").read_text().splitlines()
    for group in options():
        assert any(re.match(rf"  - {group}: \S+ # \w+", line) for line in lines), group


def test_recipes_are_found_from_their_own_file(monkeypatch, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "train.yaml").write_text("wrong: true\n")
    monkeypatch.chdir(tmp_path)
    assert recipes_dir() == Path(__file__).resolve().parents[2] / "recipes"
