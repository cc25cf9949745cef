"""`phsa-eval`: ask trained models, and write what they answered as JSON, Markdown and plots.

  phsa-eval runs/mine                                          needles, variables, common words at 1k to 4k
  phsa-eval runs/mine tasks=[needle] lengths=[8192,32768] topk=[1,2,4,8,16]
  phsa-eval runs/k1 runs/k2 runs/k4 topk=[1,2,4] seeds=[1,2,3] --out runs/matrix   training k by inference k
  phsa-eval runs/mine selectors=[own,dense,mean_pool]          other ways to attend with the same weights
  phsa-eval runs/mine tasks=[longbench] longbench_dir=data/longbench
  phsa-eval runs/mine tasks=[perplexity] texts_dir=data/held_out
  phsa-eval runs/mine tasks=[arc_c,hellaswag] data_dir=data/hub   through lm-eval, offline
  phsa-eval models/smollm2 tasks=[needle]                      a transformers folder
  phsa-eval lm-eval --model phsa --model_args run=runs/mine --tasks arc_easy   all of lm_eval's arguments
  phsa-eval --list                                             every task

Written to OUT (RUN/evaluation): results.json, results.md, PNG files, and samples.jsonl with every answer. The
same command again asks only what is missing there.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks import results
from phsa_megatron.evaluation.tasks.evaluate import Tell, check, evaluate
from phsa_megatron.evaluation.tasks.model_view import views_of
from phsa_megatron.evaluation.tasks.samples import Samples
from phsa_megatron.evaluation.tasks.settings import PERPLEXITY, TASK_GROUPS, EvalSettings, describe, parse
from phsa_megatron.monitoring.recorder import environment


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: an argument is wrong, data is missing, or a model cannot be opened.
    """
    if argv[:1] == ["lm-eval"]:
        from phsa_megatron.evaluation.tasks import lm_eval_model

        return lm_eval_model.main(argv[1:])
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.list:
        for group, names in TASK_GROUPS.items():
            print(f"{group}: {', '.join(names)}")
        print(PERPLEXITY)
        return 0
    folders = [Path(word) for word in arguments.words if "=" not in word]
    settings = parse([word for word in arguments.words if "=" in word])
    out = _out(arguments.out, folders)
    check(settings)
    content = measure(folders, settings, Samples(out / "samples.jsonl"))
    page = results.write(out, {"command": shlex.join(["phsa-eval", *argv]), **content})
    Console().print(Markdown(page))
    print(f"written: {out}/results.json, results.md, plots, samples.jsonl")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phsa-eval",
        description=__doc__,
        epilog=f"settings, with their defaults:\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN | KEY=VALUE",
        help="run folders or transformers folders, and settings",
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: RUN/evaluation)")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    return parser


def _out(given: Path | None, folders: list[Path]) -> Path:
    if not folders:
        raise ConfigError("which model? phsa-eval RUN [RUN ...] [KEY=VALUE ...]; --help has examples")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a model is there twice: name each folder once")
    if given is None and len(folders) > 1:
        raise ConfigError("several models: --out FOLDER says where their common results go")
    return given or folders[0] / "evaluation"


def measure(folders: list[Path], settings: EvalSettings, samples: Samples) -> dict[str, Any]:
    """Return `settings`, `environment`, `records` and `sparsity` of all models.

    Args:
        folders: run folders or transformers folders.
        settings: what is asked.
        samples: where answers are kept as they come.

    Raises:
        PhsaError: a model cannot be opened, or takes no texts of the length.
    """
    records: list[dict[str, Any]] = []
    sparsity: list[dict[str, Any]] = []
    with _progress() as tell:
        for folder in folders:
            with views_of(folder, settings) as views:
                for view in views:
                    records += evaluate(view, settings, samples, tell)
                    sparsity += [
                        {**view.labels, "length": length, **view.sparsity(length)}
                        for length in settings.lengths
                    ]
    return {
        "settings": asdict(settings),
        "environment": environment(),
        "records": records,
        "sparsity": sparsity,
    }


@contextmanager
def _progress() -> Iterator[Tell]:
    """Yield what is told of each sample: a bar on a terminal, elsewhere a line for each finished part."""
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for finished in tasks.values():
                    bar.update(finished, visible=False)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)
            if done == total and not console.is_terminal:
                console.print(f"{what}: {total} of {total}", soft_wrap=True)

        yield tell
