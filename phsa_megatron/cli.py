"""`phsa-train`: finds the command and imports it only then, so that most run where there is no torch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phsa_megatron import __version__
from phsa_megatron.config.errors import ConfigError, PhsaError

if TYPE_CHECKING:
    from phsa_megatron.config.schema import TrainConfig

_TRAIN_HELP = """\
Train, or resume a run that left a checkpoint. One process; for several use phsa-launch with the same
arguments.

  phsa-train recipe=phsa_demo_cpu                        a named run
  phsa-train recipe=phsa_demo_cpu optim.lr=1e-3          with one setting changed
  phsa-train recipe=mine --recipes-dir ~/recipes         with recipes of your own beside the built-in ones
  phsa-train --config runs/phsa_demo_cpu/config.yaml     exactly the resolved settings of a run folder
"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: one line for the overview.
        run: takes the arguments after the command's name, returns the exit code.
    """

    summary: str
    run: Callable[[list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for an error that the message explains."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except PhsaError as error:
        print(f"phsa-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phsa-train: interrupted", file=sys.stderr)
        return 130


def evaluate(argv: list[str] | None = None) -> int:
    """Run `phsa-eval` and return its exit code: 2 for an error that the message explains."""
    try:
        return _in_megatron("phsa_megatron.evaluation.tasks.command")(sys.argv[1:] if argv is None else argv)
    except PhsaError as error:
        print(f"phsa-eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("phsa-eval: interrupted; the same command again goes on from here", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"phsa-megatron {__version__}")
        return 0
    if argv[0] in COMMANDS:
        return COMMANDS[argv[0]].run(argv[1:])
    if argv[0].startswith("-") or "=" in argv[0]:
        return _train(argv)
    from phsa_megatron.config.keys import did_you_mean

    raise ConfigError(
        f"unknown command '{argv[0]}'.{did_you_mean(argv[0], list(COMMANDS))} "
        f"Commands: {', '.join(COMMANDS)}. To train: phsa-train recipe=NAME"
    )


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: phsa-train [recipe=NAME] [GROUP=NAME] [KEY=VALUE] ...\n"
        "       phsa-train COMMAND ...\n\n"
        f"{_TRAIN_HELP}\ncommands (each with --help):\n" + "\n".join(lines)
    )


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"phsa-train {name}".strip(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, GROUP=NAME, KEY=VALUE"
    )
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )


def _train(argv: list[str]) -> int:
    parser = _parser("", _TRAIN_HELP)
    _add_overrides(parser)
    parser.add_argument("--config", type=Path, help="a resolved file: the config.yaml of a run folder")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is not None:
        if arguments.overrides or arguments.recipes_dir:
            raise ConfigError(
                f"--config={arguments.config} holds every setting and takes no other argument; "
                "to change one, give recipe=NAME and the changed KEY=VALUE instead"
            )
        return _start(_resolved_run(arguments.config), arguments.config)
    from phsa_megatron.config.compose import compose
    from phsa_megatron.config.prepare_run import Start, prepare_run_folder

    _refuse_to_compose_in_every_rank()
    config = compose(arguments.overrides, arguments.recipes_dir).config
    _check(config)
    prepared = prepare_run_folder(config)
    print("\n".join(prepared.messages), flush=True)
    if prepared.start == Start.finished:
        return 0
    return _start(config, prepared.folder.config_file)


def _resolved_run(path: Path) -> TrainConfig:
    """Return the settings in a resolved file, which the launcher or an earlier start has prepared."""
    from phsa_megatron.config.resolved import load
    from phsa_megatron.config.validate import validate

    config = load(path)
    if "RANK" in os.environ:
        validate(config)
    else:
        _check(config)
    return config


def _check(config: TrainConfig) -> None:
    from phsa_megatron.config.derive import world_size
    from phsa_megatron.config.validate import validate

    validate(config)
    processes = world_size(config)
    if processes > 1:
        raise ConfigError(
            f"cluster.num_nodes={config.cluster.num_nodes}, cluster.processes_per_node="
            f"{config.cluster.processes_per_node}: this run has {processes} processes and phsa-train is one; "
            "start it with phsa-launch and the same arguments"
        )


def _refuse_to_compose_in_every_rank() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: settings are composed once, not in every process; use "
            "phsa-launch with the same arguments, or give all processes --config RUN/config.yaml"
        )


def _start(config: TrainConfig, config_file: Path) -> int:
    from phsa_megatron.config.environment import process_environment

    os.environ.update(process_environment(config))
    return _call("phsa_megatron.train", "main")(str(config_file))


def _call(module: str, function: str) -> Callable[..., int]:
    """Return a function of a module that needs torch, or say what is missing."""
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "phsa_megatron":
            raise
        raise ConfigError(
            f"this command needs the package '{error.name}', which is not installed here; install "
            "phsa-megatron[cpu] or phsa-megatron[gpu]"
        ) from error


def _elsewhere(module: str, function: str = "main") -> Callable[[list[str]], int]:
    """Return a command that lives in another room and reads its own arguments."""

    def run(argv: list[str]) -> int:
        return _call(module, function)(argv)

    return run


def _in_megatron(module: str) -> Callable[[list[str]], int]:
    """Return a command that opens a model in this process: the CPU shim comes before megatron is imported."""

    def run(argv: list[str]) -> int:
        _call("phsa_megatron.parallel.cpu_shim", "install")()
        _call("phsa_megatron.parallel.mcore", "hide_known_notices")()
        return _call(module, "main")(argv)

    return run


def _on_cpu(module: str) -> Callable[[list[str]], int]:
    """Return a command that opens a model on the CPU of any machine."""

    def run(argv: list[str]) -> int:
        _call("phsa_megatron.parallel.cpu_shim", "install")(hide_gpu=True)
        _call("phsa_megatron.parallel.mcore", "hide_known_notices")()
        return _call(module, "main")(argv)

    return run


def _explain(argv: list[str]) -> int:
    parser = _parser(
        "explain",
        "Print a setting: value, unit, meaning, who set it, what follows from it; or a group's settings.\n\n"
        "  phsa-train explain attention.train_topk recipe=phsa_demo_cpu\n"
        "  phsa-train explain optim",
    )
    parser.add_argument("key", nargs="?", help="a key, a group, or nothing for the list of groups")
    _add_overrides(parser)
    arguments = parser.parse_intermixed_args(argv)
    key, overrides = arguments.key, arguments.overrides
    if key is not None and "=" in key:  # only overrides were given
        key, overrides = None, [key, *overrides]
    from rich.console import Console

    from phsa_megatron.config import explain

    explain.main(overrides, key, arguments.recipes_dir, Console())
    return 0


def _validate(argv: list[str]) -> int:
    parser = _parser(
        "validate", "Compose a run, check every rule and print every derived number. Needs no torch."
    )
    _add_overrides(parser)
    arguments = parser.parse_intermixed_args(argv)
    from phsa_megatron.config.compose import compose
    from phsa_megatron.config.derive import derive
    from phsa_megatron.config.validate import validate

    config = compose(arguments.overrides, arguments.recipes_dir).config
    validate(config)
    print("\n".join(derive(config).equations()))
    return 0


def _plan(argv: list[str]) -> int:
    from rich.console import Console

    from phsa_megatron.config.planning import command

    parser = _parser("plan", command.description())
    _add_overrides(parser)
    command.add_arguments(parser)
    return command.main(parser.parse_intermixed_args(argv), Console())


def _recipes(argv: list[str]) -> int:
    parser = _parser("recipes", "List the recipes and the files of every group.")
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )
    arguments = parser.parse_args(argv)
    from rich.console import Console

    from phsa_megatron.config.recipe_list import recipe_tables

    for table in recipe_tables(arguments.recipes_dir):
        Console().print(table)
    return 0


COMMANDS: dict[str, Command] = {
    "explain": Command("what a setting is, who set it, what follows from it", _explain),
    "validate": Command("check a run and print its derived numbers", _validate),
    "plan": Command("predict memory and speed of a run's layouts on a cluster, and choose one", _plan),
    "recipes": Command("list recipes and groups", _recipes),
    "prepare-demo": Command(
        "make the demo's tokenizer and data sets", _elsewhere("phsa_megatron.data.commands", "prepare_demo")
    ),
    "prepare-data": Command(
        "turn text files into an indexed data set", _elsewhere("phsa_megatron.data.commands", "prepare_data")
    ),
    "prepare-tokenizer": Command(
        "make a tokenizer.json", _elsewhere("phsa_megatron.data.commands", "prepare_tokenizer")
    ),
    "show-batch": Command(
        "print the documents of one step: step=N", _elsewhere("phsa_megatron.data.commands", "show_batch")
    ),
    "doctor": Command("what this machine has, and what to install", _elsewhere("phsa_megatron.doctor")),
    "preflight": Command(
        "check this node, and its place among the others, before a run",
        _elsewhere("phsa_megatron.preflight.command"),
    ),
    "punctuation": Command(
        "a tokenizer's punctuation set, and how dense it is in texts",
        _elsewhere("phsa_megatron.evaluation.punctuation_density"),
    ),
    "import-hf": Command(
        "turn a Hugging Face folder into a run's checkpoint", _on_cpu("phsa_megatron.convert.import_hf")
    ),
    "export-hf": Command(
        "turn a run's checkpoint into a Hugging Face folder", _on_cpu("phsa_megatron.convert.export_hf")
    ),
    "information-loss": Command(
        "what selection loses in a trained model, by selector, k, layer and head",
        _in_megatron("phsa_megatron.evaluation.information_loss"),
    ),
    "compare": Command(
        "train and evaluate attentions under equal budgets", _elsewhere("phsa_megatron.evaluation.compare")
    ),
    "measure-training": Command(
        "measure whole training steps at full size on one GPU",
        _in_megatron("phsa_megatron.evaluation.full_size.command"),
    ),
    "claim-study": Command(
        "train small models with every attention, and compare losses, needles and kept mass",
        _in_megatron("phsa_megatron.evaluation.claim_study.command"),
    ),
    "selector-study": Command(
        "needles and attention mass of every selector on SmolLM2-135M",
        _in_megatron("phsa_megatron.evaluation.selector_study"),
    ),
    "report": Command(
        "the page of a run, or of several runs compared",
        _elsewhere("phsa_megatron.monitoring.report_command"),
    ),
    "replay": Command(
        "run a step again: one that a run stopped at, or any other",
        _in_megatron("phsa_megatron.training.replay"),
    ),
    "profile": Command(
        "trace steps of a recipe: kernels, memory, a timeline",
        _in_megatron("phsa_megatron.training.profile_command"),
    ),
    "wandb": Command(
        "read a run's offline W&B folders without a server",
        _elsewhere("phsa_megatron.monitoring.wandb_offline"),
    ),
    "verify-resume": Command(
        "show that a resumed run equals an uninterrupted one",
        _elsewhere("phsa_megatron.training.verify_resume"),
    ),
}
"""All commands but training itself, which takes KEY=VALUE arguments and needs no name."""


if __name__ == "__main__":
    sys.exit(main())
