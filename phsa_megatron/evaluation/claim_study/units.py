"""What the study trains: variants of the attention, seeds, and the order in which they are worth most.

A unit is one variant at one seed. Seeds come first in the order, and in a seed the main variants come first:
whenever the time is over, the finished part is a comparison. Units of a seed have the same weights at the
start, the same text in the same order and the same budget.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.derive import derive, world_size
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.keys import did_you_mean
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, KernelImpl, TrainConfig
from phsa_megatron.config.selector_kinds import (
    EAGER_ONLY,
    WITH_PARAMETERS,
    WITHOUT_SELECTION,
    learned_selector,
)
from phsa_megatron.config.validate import validate
from phsa_megatron.config.yaml_file import leaves

DEFAULT_RECIPE = "phsa_34m_claim_1gpu_h100_bf16_4k"
TOPKS = (1, 2, 4, 8, 16)
"""Values of k that every model is evaluated with."""


@dataclass(frozen=True)
class Variant:
    """One attention to train with.

    Attributes:
        name: in files and tables.
        recipe: file of the group `attention`.
        settings: KEY=VALUE besides.
        about: what it is, for the page.
    """

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    about: str = ""


_EN_ZH = "attention.punctuation_language=en_zh"
MAIN = ("mean_pool", "phsa_en_zh", "dense", "phsa", "infllm_v2")
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("mean_pool", "mean_pool", (), "plain mean of each block (lambda = 1)"),
        Variant("phsa_en_zh", "phsa_en_zh", (), "PHSA, English and Chinese punctuation"),
        Variant("dense", "dense", (), "full causal attention"),
        Variant("phsa", "phsa", (), "PHSA, English punctuation"),
        Variant("infllm_v2", "infllm_v2", (), "InfLLM-V2's pooling at block 16"),
        Variant(
            "random_tokens",
            "random_tokens",
            (_EN_ZH,),
            "control: as many random tokens of each block as are English or Chinese punctuation",
        ),
        Variant("halves", "halves", (), "the better of two half-block means: most needles untrained"),
        Variant("phsa_en_zh_k1", "phsa_en_zh", ("attention.train_topk=1",), "trained at k = 1"),
        Variant("phsa_en_zh_k4", "phsa_en_zh", ("attention.train_topk=4",), "trained at k = 4"),
    )
}
"""In the order of training inside a seed. Any other file of the group `attention` can be named too."""


@dataclass(frozen=True)
class Unit:
    """One model to train and evaluate."""

    variant: Variant
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Returns the name of its files."""
        return f"{self.variant.name}-seed{self.seed}"


def variant_of(name: str) -> Variant:
    """Returns a variant by its name.

    Raises:
        ConfigError: there is none.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    known = list(dict.fromkeys([*VARIANTS, *options()["attention"]]))
    if name not in known:
        raise ConfigError(f"--variants: no variant or recipe attention={name}.{did_you_mean(name, known)}")
    return Variant(name, name, (), f"attention={name}")


def make_units(names: list[str], seeds: list[int], overrides: list[str], out: Path) -> list[Unit]:
    """Returns all units in the order of their worth, every one of them checked.

    Raises:
        ConfigError: a run breaks a rule, or two of them differ in more than the attention.
    """
    for key in ("attention", "attention.train_topk", "run.seed", "run.name", "run.root_dir"):
        if any(override.partition("=")[0] == key for override in overrides):
            raise ConfigError(f"{key}=...: the study sets it itself; use --variants, --seeds and --out")
    if len(set(names)) < len(names) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--variants {names} --seeds {seeds}: each at most once")
    order = list(VARIANTS)
    names = sorted(names, key=lambda name: order.index(name) if name in order else len(order))
    units: list[Unit] = []
    for seed in seeds:
        for name in names:
            variant = variant_of(name)
            config = _configure(variant, seed, overrides, out / "runs")
            if units:
                require_equal_budget(variant, config, units[0].config)
            units.append(Unit(variant, seed, config))
    return units


def _configure(variant: Variant, seed: int, overrides: list[str], runs: Path) -> TrainConfig:
    has_recipe = any(override.startswith("recipe=") for override in overrides)
    arguments = [
        *([] if has_recipe else [f"recipe={DEFAULT_RECIPE}"]),
        *overrides,
        f"attention={variant.recipe}",
        *variant.settings,
        f"run.seed={seed}",
        f"run.name={variant.name}-seed{seed}",
        f"run.root_dir={runs}",
    ]
    config = compose(arguments).config
    config.attention = with_eager_choice(config.attention)
    learned = learned_selector(config.attention)
    if learned is not None or config.attention.align_coeff:
        raise ConfigError(
            f"--variants {variant.name}: {learned or 'attention.align_coeff'} trains more than the rest: "
            "units of a seed would not be alike; the study takes selectors without parameters"
        )
    validate(config)
    if world_size(config) != 1:
        raise ConfigError("the study trains in one process: set cluster=local_gpu or cluster=local_cpu")
    return config


def with_eager_choice(attention: AttentionConfig) -> AttentionConfig:
    """Returns the settings, with an eager choice beside Triton attention where a selector has no kernel."""
    eager = attention.kind == AttentionKind.phsa and attention.selector in EAGER_ONLY - WITH_PARAMETERS
    if eager and attention.impl == KernelImpl.triton:
        return replace(attention, select_impl=KernelImpl.reference)
    return attention


def require_equal_budget(variant: Variant, config: TrainConfig, first: TrainConfig) -> None:
    """Refuses a unit that differs from the first one in more than the attention, its k and its punctuation.

    Raises:
        ConfigError: naming what differs.
    """
    ours, theirs = _without_attention(config), _without_attention(first)
    wrong = [key for key, value in ours.items() if value != theirs.get(key)]
    equal = ("block_tokens", "init_tokens", "local_tokens", "dense_len_tokens", "impl")
    if AttentionKind.dense not in (config.attention.kind, first.attention.kind):
        wrong += [
            f"attention.{key}"
            for key in equal
            if getattr(config.attention, key) != getattr(first.attention, key)
        ]
    if wrong:
        raise ConfigError(f"{variant.name} also changes {', '.join(wrong)}: budgets would differ")


def _without_attention(config: TrainConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in leaves(asdict(config))
        if not key.startswith("attention.") and key not in ("run.name", "run.seed")
    }


@dataclass(frozen=True)
class View:
    """One way to let a trained model attend.

    Attributes:
        name: `dense`, `k2` of the model's own selector, or `mean_pool/k2` of another.
        attention: settings that layers and side information get.
        topk: k; nothing reads it where attention is dense.
        is_dense: full causal attention in every layer.
    """

    name: str
    attention: AttentionConfig
    topk: int
    is_dense: bool


def views_of(unit: Unit, units: list[Unit]) -> list[View]:
    """Returns how a unit's model is evaluated.

    A model with a selector: with it at every k, and dense. A dense one: dense, and with every selector of
    the study that has no k of its own, at every k.
    """
    own = unit.config.attention
    dense = View("dense", replace(own, kind=AttentionKind.phsa), own.train_topk, True)
    if own.kind == AttentionKind.phsa:
        if own.selector in WITHOUT_SELECTION:
            return [View("k0", own, own.train_topk, False), dense]
        return [*(View(f"k{k}", own, k, False) for k in TOPKS), dense]
    found = [dense]
    for other in units:
        settings = other.config.attention
        plain = other.seed == unit.seed and settings.kind == AttentionKind.phsa
        if (
            plain
            and settings.selector not in WITHOUT_SELECTION
            and not other.variant.name.endswith(("_k1", "_k4"))
        ):
            found += [View(f"{other.variant.name}/k{k}", settings, k, False) for k in TOPKS]
    return found


def tokens_of(unit: Unit) -> int:
    """Returns the tokens that a unit trains on."""
    return derive(unit.config).total_tokens
