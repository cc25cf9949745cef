"""Where the YAML recipes are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from phsa_megatron.config.errors import ConfigError


def recipes_dir() -> Path:
    """Return the folder of the built-in recipes.

    It is found from this file alone, never from the working directory, so that an installed wheel run inside
    somebody's checkout reads its own recipes. A checkout wins over `_recipes`: an editable install leaves a
    stale copy of the latter behind.

    Raises:
        ConfigError: the installation holds no recipes.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "recipes", package / "_recipes"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(
        f"no recipes beside {package}: neither {package.parent / 'recipes'} nor {package / '_recipes'} holds "
        "train.yaml. The installation is incomplete; install phsa-megatron again."
    )
