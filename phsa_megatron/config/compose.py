"""Composes a run's settings once, from the schema, the recipe groups, a recipe and the command line.

Hydra reads the YAML files and decides their order. Everything a person may get wrong (a misspelt key, a
wrong type, a file that does not exist, a value nobody gave) is checked here, so that the answer names the
file, the line and the nearest right name, and so that every value's origin is known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phsa_megatron.config import check_keys, keys
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.overrides import GROUPS, Overrides, choice_problem, parse_overrides
from phsa_megatron.config.recipes_path import recipes_dir as builtin_recipes_dir
from phsa_megatron.config.resolved import dump, load, to_config
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.yaml_file import YamlFile, describe_yaml_error, leaves, nested, read_yaml

__all__ = ["Composed", "Origin", "OriginKind", "Tree", "compose", "compose_tree", "dump", "load", "options"]


class OriginKind(StrEnum):
    """Who may set a value; later ones win."""

    schema = "schema default"
    file = "file"
    command_line = "command line"


@dataclass(frozen=True)
class Origin:
    """Who set a value.

    Attributes:
        kind: schema, file or command line.
        where: `recipes/model/qwen3_8b.yaml:5`, or the argument as typed, or nothing for a default.
    """

    kind: OriginKind
    where: str = ""

    def __str__(self) -> str:
        return self.where if self.kind == OriginKind.file else f"{self.kind} {self.where}".strip()


@dataclass(frozen=True)
class Tree:
    """Composed settings, some of which may still be missing.

    Attributes:
        tree: typed settings; required ones that nobody gave are `???`.
        provenance: who set each value, by dotted key.
        choices: the chosen file of each group.
    """

    tree: DictConfig
    provenance: dict[str, Origin]
    choices: dict[str, str | None]

    def missing(self) -> list[str]:
        """Return the required keys that nobody gave, in the order of the schema."""
        values = OmegaConf.to_container(self.tree)
        assert isinstance(values, dict)
        absent = {key for key, value in leaves({str(k): v for k, v in values.items()}) if value == MISSING}
        return [key for key in self.provenance if key in absent]


@dataclass(frozen=True)
class Composed:
    """A complete run.

    Attributes:
        config: the settings.
        provenance: who set each value, by dotted key.
        choices: the chosen file of each group.
    """

    config: TrainConfig
    provenance: dict[str, Origin]
    choices: dict[str, str | None]


def compose(overrides: list[str], recipes_dir: Path | None = None) -> Composed:
    """Compose a run.

    Args:
        overrides: `recipe=NAME`, `GROUP=NAME` and `KEY=VALUE` arguments.
        recipes_dir: a person's own folder with the same groups, searched beside the built-in one.

    Raises:
        ConfigError: an argument or a file does not fit the schema, or a required value is missing.
    """
    result = compose_tree(overrides, recipes_dir)
    missing = result.missing()
    if missing:
        raise ConfigError(_missing_message(missing, result.choices))
    return Composed(to_config(result.tree), result.provenance, result.choices)


def compose_tree(overrides: list[str], recipes_dir: Path | None = None) -> Tree:
    """Compose a run that may lack required values; otherwise as `compose`."""
    builtin = builtin_recipes_dir()
    folders = [builtin] if recipes_dir is None else [builtin, _own_recipes_dir(recipes_dir, builtin)]
    available = options(recipes_dir)
    arguments = parse_overrides(overrides, available)
    choices = tuple(
        f"{group}={'null' if name is None else name}" for group, name in arguments.choices.items()
    )
    # A person's own recipes may change while this process lives, as in a notebook; ours do not.
    composed, files, chosen = (_compose_files if recipes_dir is None else _compose_files.__wrapped__)(
        choices, tuple(folders)
    )
    layers = [nested(key, value) for key, value, _ in arguments.settings]
    tree = OmegaConf.merge(OmegaConf.structured(TrainConfig), composed, *layers)
    assert isinstance(tree, DictConfig)
    return Tree(tree, _provenance(tree, files, arguments), {group: chosen.get(group) for group in GROUPS})


@lru_cache(maxsize=64)
def _compose_files(
    choices: tuple[str, ...], folders: tuple[Path, ...]
) -> tuple[DictConfig, list[_RecipeFile], dict[str, str | None]]:
    """Return what the chosen files say together, the files in order, and the choice of each group.

    Args:
        choices: `GROUP=NAME` of the command line.
        folders: the built-in recipes, and a person's own.
    """
    available = options(folders[1] if len(folders) > 1 else None)
    search = [f"hydra.searchpath=['file://{folder}']" for folder in folders[1:]]
    hydra_overrides = [*choices, *search]
    ConfigStore.instance().store(name="schema", node=TrainConfig, provider="phsa_megatron")
    with (
        _messages_for_people(available),
        initialize_config_dir(config_dir=str(folders[0]), job_name="phsa-train", version_base="1.3"),
    ):
        loader = GlobalHydra.instance().config_loader()
        order = loader.compute_defaults_list("train", hydra_overrides, RunMode.RUN).defaults
        files = [_read(entry, list(folders)) for entry in order if _is_recipe_file(entry)]
        _check_files(files)
        composed = hydra_compose("train", overrides=hydra_overrides, return_hydra_config=True)
    chosen = {str(group): name for group, name in composed.hydra.runtime.choices.items()}
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed, files, chosen


def options(recipes_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the names that can be chosen in each group."""
    folders = [builtin_recipes_dir(), *([] if recipes_dir is None else [recipes_dir])]
    return {g: sorted(p.stem for folder in folders for p in (folder / g).glob("*.yaml")) for g in GROUPS}


@dataclass(frozen=True)
class _RecipeFile:
    """A file in the order of composition: what it sets, under which keys, and how to name it to a person."""

    file: YamlFile
    package: str
    shown_as: str

    def settings(self) -> dict[str, object]:
        values = {key: value for key, value in self.file.values.items() if key != "defaults"}
        return nested(self.package, values) if self.package else values

    def line(self, key: str) -> str:
        inside = key.removeprefix(self.package + ".") if self.package else key
        number = self.file.lines.get(inside)
        return self.shown_as if number is None else f"{self.shown_as}:{number}"


def _is_recipe_file(entry: ResultDefault) -> bool:
    path = entry.config_path or ""
    return path != "schema" and path.split("/", 1)[0] != "hydra"


def _read(entry: ResultDefault, folders: list[Path]) -> _RecipeFile:
    name = f"{entry.config_path}.yaml"
    folder = next(folder for folder in folders if (folder / name).is_file())
    shown_as = f"recipes/{name}" if folder == folders[0] else str(folder / name)
    return _RecipeFile(read_yaml(folder / name), entry.package or "", shown_as)


def _check_files(files: list[_RecipeFile]) -> None:
    lines = [
        f"{file.line(key)}: {message}"
        for file in files
        for key, message in check_keys.problems(file.settings())
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _provenance(tree: DictConfig, files: list[_RecipeFile], arguments: Overrides) -> dict[str, Origin]:
    given: dict[str, Origin] = {}
    for file in files:
        for key, value in leaves(file.settings()):
            if value != "???":
                given[key] = Origin(OriginKind.file, file.line(key))
    for key, value, text in arguments.settings:
        for leaf, _ in leaves(nested(key, value)):
            given[leaf] = Origin(OriginKind.command_line, text)
    container = OmegaConf.to_container(tree)
    assert isinstance(container, dict)
    settings = {str(key): value for key, value in container.items()}
    return {key: given.get(key, Origin(OriginKind.schema)) for key, _ in leaves(settings)}


def _own_recipes_dir(folder: Path, builtin: Path) -> Path:
    folder = folder.resolve()
    if not folder.is_dir():
        raise ConfigError(f"--recipes-dir={folder}: no such folder")
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if (builtin / name).is_file():
            raise ConfigError(f"{path} has the name of a built-in recipe ({name.stem}); rename it")
    if not any((folder / group).is_dir() for group in GROUPS):
        raise ConfigError(
            f"--recipes-dir={folder} holds none of the groups {', '.join(GROUPS)}; put a recipe in "
            f"{folder / 'recipe'}, a cluster in {folder / 'cluster'}, and so on"
        )
    return folder


@contextmanager
def _messages_for_people(available: dict[str, list[str]]) -> Iterator[None]:
    """Turn what Hydra raises about a recipe file into a ConfigError without its advice to add keys."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_message(error, available)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        name = "a recipe" if mark is None else mark.name
        raise ConfigError(f"{name} is not valid YAML: {describe_yaml_error(error)}") from error


def _hydra_message(error: Exception, available: dict[str, list[str]]) -> str:
    text = str(error)
    where = re.search(r"In '([^']+)'", text)
    prefix = f"recipes/{where.group(1)}.yaml: " if where else ""
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if missing and missing.group(1).split("/")[0] in available:
        group, _, name = missing.group(1).partition("/")
        return prefix + (choice_problem(group, name, available) or text.splitlines()[0])
    group_override = re.search(r"Could not override '([^']+)'", text)
    if group_override:
        name = group_override.group(1)
        return (
            f"{prefix}'override /{name}' names no group.{keys.did_you_mean(name, list(GROUPS))} "
            f"Groups: {', '.join(GROUPS)}"
        )
    kept = [line for line in text.splitlines() if line.strip() and "+" not in line]
    return prefix + (kept[0] if kept else type(error).__name__)


def _missing_message(missing: list[str], choices: dict[str, str | None]) -> str:
    lines = []
    unchosen = [g for g in GROUPS if g != "recipe" and not choices[g] and any(_in(k, g) for k in missing)]
    if unchosen and not choices["recipe"]:
        lines.append("start from a recipe with recipe=NAME (list them with: phsa-train recipes), or")
    lines += [f"choose a {group}: {group}={'|'.join(options()[group])}" for group in unchosen]
    for key in missing:
        field = keys.find(key)
        if field is not None and not any(_in(key, group) for group in unchosen):
            lines.append(f"set {key}=... ({field.expected}): {field.meaning}")
    return "required values are missing:\n" + "\n".join(f"  {line}" for line in lines)


def _in(key: str, group: str) -> bool:
    return key.startswith(group + ".")
