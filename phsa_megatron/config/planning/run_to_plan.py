"""The run that is planned: a recipe, without the text that it is going to read."""

from __future__ import annotations

from pathlib import Path

from phsa_megatron.config.compose import compose, compose_tree
from phsa_megatron.config.schema import TrainConfig


def run_to_plan(overrides: list[str], recipes_dir: Path | None = None) -> TrainConfig:
    """Compose a run; shares and paths of text that nobody gave are filled in: no layout depends on them.

    Raises:
        ConfigError: as `compose`; anything else that is missing.
    """
    tree = compose_tree(overrides, recipes_dir)
    absent = [key for key in tree.missing() if key.startswith("data.sources.")]
    filled = [f"{key}={1 if key.endswith('.weight') else 'not-read-by-the-plan'}" for key in absent]
    prefixes = [key for key in absent if key.endswith(".train_prefix")]
    if prefixes:
        valid = prefixes[0].replace(".train_prefix", ".valid_prefix")
        filled += [f"{valid}=not-read-by-the-plan"] * (not any(valid in text for text in overrides))
    return compose([*overrides, *filled], recipes_dir).config
