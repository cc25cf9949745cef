"""The run that is planned: a recipe, without the text that it is going to read."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from phsa_megatron.config.compose import compose, compose_tree
from phsa_megatron.config.resolved import to_config
from phsa_megatron.config.schema import TrainConfig

_NOT_READ = "not-read-by-the-plan"


def run_to_plan(overrides: list[str], recipes_dir: Path | None = None) -> TrainConfig:
    """Compose a run; shares and paths of text that nobody gave are filled in: no layout depends on them.

    Raises:
        ConfigError: as `compose`; anything else that is missing.
    """
    composed = compose_tree(overrides, recipes_dir)
    absent = composed.missing()
    text = [key for key in absent if key.startswith("data.sources.")]
    if len(text) < len(absent):
        return compose(overrides, recipes_dir).config  # which says what is missing
    for key in text:
        OmegaConf.update(composed.tree, key, 1.0 if key.endswith(".weight") else _NOT_READ)
    config = to_config(composed.tree)
    if text and not any(source.valid_prefix for source in config.data.sources.values()):
        next(iter(config.data.sources.values())).valid_prefix = _NOT_READ
    return config
