"""`phsa-train compare`: train and evaluate attentions under equal budgets, over seeds, in one table.

  phsa-train compare recipe=phsa_demo_cpu selectors=[phsa,mean_pool,random_tokens,window,dense] seeds=[1,2,3]
  phsa-train compare recipe=phsa_demo_cpu selectors=[phsa,moba] seeds=[1] run.train_steps=50 --out runs/short

`selectors` are files of the group `attention`. Every run has the recipe's data, order, steps, weights at the
start (by seed), windows, block size, k and punctuation set; only what chooses the blocks differs. A run is an
ordinary run folder OUT/NAME-seedN: a second start of the same command keeps what is finished and resumes what
is not. --own-settings leaves windows, block size, k and punctuation as each file has them.

Written to OUT: compare.md, compare.json and compare.png: the mean and the spread (standard deviation, with
n - 1) over seeds, and the difference to the first selector, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from phsa_megatron.config.compose import compose, options
from phsa_megatron.config.derive import derive, world_size
from phsa_megatron.config.errors import ConfigError, TrainingError
from phsa_megatron.config.keys import did_you_mean
from phsa_megatron.config.resolved import load
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionKind, Selector, TrainConfig
from phsa_megatron.config.validate import validate
from phsa_megatron.config.yaml_file import leaves

_BUDGET = ("block_tokens", "init_tokens", "local_tokens", "train_topk", "infer_topk", "dense_len_tokens")
_PUNCTUATION = ("punctuation_match", "punctuation_language")
_LOGGED = ("attention/kept_mass_frac", "attention/oracle_gain_frac")
_SHOWN_LINES = 30


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: an argument is wrong, the budgets are not equal, or a run failed.
    """
    arguments = _parse(argv)
    lists, overrides = _split(arguments.overrides)
    out: Path = arguments.out or Path("runs") / "compare"
    runs = plan(lists["selectors"], lists["seeds"], overrides, out, own_settings=arguments.own_settings)
    records = [_result(name, seed, config) for name, seed, config in _train(runs, overrides, out)]
    out.mkdir(parents=True, exist_ok=True)
    text = write(out, records, overrides)
    print(text)
    print(f"written: {out}/compare.md, compare.json, compare.png")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="phsa-train compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="recipe=, selectors=[..], seeds=[..], KEY=VALUE"
    )
    parser.add_argument("--out", type=Path, help="folder of runs and results (default: runs/compare)")
    parser.add_argument(
        "--own-settings", action="store_true", help="windows, block, k and punctuation of each file"
    )
    return parser.parse_intermixed_args(argv)


def _split(arguments: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return (selectors and seeds, all other arguments)."""
    lists: dict[str, list[str]] = {}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("selectors", "seeds"):
            lists[key] = [part.strip() for part in value.strip("[]").split(",") if part.strip()]
        elif key in ("attention", "run.seed", "run.name", "run.root_dir"):
            raise ConfigError(f"{argument}: compare sets {key} itself; use selectors=, seeds= and --out")
        else:
            rest.append(argument)
    known = options()["attention"]
    for key in ("selectors", "seeds"):
        if not lists.get(key):
            raise ConfigError(f"{key}=[...] is missing, such as selectors=[phsa,mean_pool] seeds=[1,2,3]")
        if len(set(lists[key])) < len(lists[key]):
            raise ConfigError(f"{key}={lists[key]}: each at most once")
    for name in lists["selectors"]:
        if name not in known:
            raise ConfigError(f"selectors: no recipe attention={name}.{did_you_mean(name, known)}")
    for seed in lists["seeds"]:
        if not seed.isdigit():
            raise ConfigError(f"seeds: {seed!r} is not a whole number")
    return lists, rest


def plan(
    selectors: list[str], seeds: list[str], overrides: list[str], out: Path, *, own_settings: bool
) -> list[tuple[str, int, list[str]]]:
    """Return (selector, seed, arguments of phsa-train) of every run, all of them checked.

    Raises:
        ConfigError: a run breaks a rule, or two differ in more than the attention.
    """
    base = compose(overrides).config
    runs: list[tuple[str, int, list[str]]] = []
    first: dict[str, Any] | None = None
    for name in selectors:
        equal = [] if own_settings else _equal_settings(name, base, overrides)
        for seed in seeds:
            run = [
                f"attention={name}",
                f"run.seed={seed}",
                f"run.name={name}-seed{seed}",
                f"run.root_dir={out}",
            ]
            arguments = [*overrides[:1], run[0], *equal, *overrides[1:], *run[1:]]
            config = compose(arguments).config
            validate(config)
            rest = {
                key: value
                for key, value in leaves(asdict(config))
                if not key.startswith("attention.") and key not in ("run.name", "run.seed")
            }
            first = first or rest
            if rest != first:
                wrong = [key for key in rest if rest[key] != first.get(key)]
                raise ConfigError(f"attention={name} also changes {', '.join(wrong)}: budgets would differ")
            runs.append((name, int(seed), arguments))
    return runs


def _equal_settings(name: str, base: TrainConfig, overrides: list[str]) -> list[str]:
    """Return the recipe's budget and punctuation set as arguments."""
    own = compose([*overrides[:1], f"attention={name}"]).config.attention
    if own.kind == AttentionKind.dense:
        return []
    if own.block_tokens != base.attention.block_tokens:
        raise ConfigError(
            f"selectors: attention={name} has blocks of {own.block_tokens} and the recipe of "
            f"{base.attention.block_tokens}; compare it with --own-settings"
        )
    keys = list(_BUDGET)
    if own.selector != Selector.separators:
        keys += _PUNCTUATION
    if own.selector in (Selector.window, Selector.dense_window):
        keys.remove("infer_topk")
    given = {override.partition("=")[0] for override in overrides}
    keys = [key for key in keys if f"attention.{key}" not in given]
    values = {key: getattr(base.attention, key) for key in keys}
    if own.selector == Selector.nsa and "attention.nsa_window_tokens" not in given:
        values["nsa_window_tokens"] = base.attention.local_tokens
    return [f"attention.{key}={'null' if value is None else value}" for key, value in values.items()]


def _train(
    runs: list[tuple[str, int, list[str]]], overrides: list[str], out: Path
) -> list[tuple[str, int, TrainConfig]]:
    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    trained = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("compare", total=len(runs))
        for number, (name, seed, arguments) in enumerate(runs, start=1):
            bar.update(task, description=f"{name}, seed {seed}")
            config = compose(arguments).config
            _train_one(config, arguments)
            trained.append((name, seed, config))
            bar.advance(task)
            if not console.is_terminal:
                console.print(f"compare: {number}/{len(runs)} {name}, seed {seed}", soft_wrap=True)
    return trained


def _train_one(config: TrainConfig, arguments: list[str]) -> None:
    module = "phsa_megatron.cli" if world_size(config) == 1 else "phsa_launch.cli"
    folder = RunFolder.of(config)
    if folder.done.exists() and load(folder.config_file) == config:
        return
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    log = folder.path.parent / f"{config.run.name}.log"
    with log.open("a", encoding="utf-8") as stream:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )
    if done.returncode or not folder.done.exists():
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-_SHOWN_LINES:])
        raise TrainingError(
            f"run {config.run.name} ended with {done.returncode} before it was done; {log} ends in:\n{tail}\n"
            "The same command again goes on from here."
        )


def _result(name: str, seed: int, config: TrainConfig) -> dict[str, Any]:
    folder = RunFolder.of(config)
    summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
    derived = derive(config)
    values = {"val/loss_nats": summary["final_val_loss_nats"]}
    for domain, loss in summary["val_by_domain"].items():
        values[f"val/{domain}/loss_nats"] = loss["loss_nats"]
    return {
        "selector": name,
        "seed": seed,
        "values": values | _last_logged(folder.metrics_file),
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "sparsity_mean_frac": derived.sparsity_mean_frac,
        "flops_per_token": derived.flops_per_token_selected,
        "packages": summary["packages"],
    }


def _last_logged(file: Path) -> dict[str, float]:
    """Return the last values of the metrics that are only there if they are asked for."""
    found: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line).get("values", {})
        found |= {name: values[name] for name in _LOGGED if name in values}
    return found


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation with n - 1; nan for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def write(out: Path, records: list[dict[str, Any]], overrides: list[str]) -> str:
    """Write compare.json, compare.md and compare.png; returns the table.

    Raises:
        TrainingError: two runs of a seed saw different numbers of tokens.
    """
    budgets: dict[int, set[tuple[int, int]]] = {}
    for record in records:
        budgets.setdefault(record["seed"], set()).add((record["steps"], record["tokens"]))
    for seed, found in budgets.items():
        if len(found) > 1:
            raise TrainingError(f"seed {seed}: runs had different steps and tokens: {sorted(found)}")
    names = list(dict.fromkeys(record["selector"] for record in records))
    by_name = {name: [r for r in records if r["selector"] == name] for name in names}
    metrics = list(dict.fromkeys(metric for record in records for metric in record["values"]))
    baseline = {record["seed"]: record["values"]["val/loss_nats"] for record in by_name[names[0]]}
    head = ["selector", *metrics, f"loss - {names[0]}", "sparsity, mean", "FLOPs/token"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, runs in by_name.items():
        cells = [name]
        for metric in metrics:
            values = [run["values"][metric] for run in runs if metric in run["values"]]
            cells.append(_cell(values) if values else "-")
        cells.append(_cell([run["values"]["val/loss_nats"] - baseline[run["seed"]] for run in runs], "+"))
        cells += [f"{runs[0]['sparsity_mean_frac']:.2%}", f"{runs[0]['flops_per_token']:.4g}"]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = sorted(baseline)
    steps = records[0]["steps"]
    tokens = " / ".join(f"{record['tokens']:,}" for record in by_name[names[0]])
    about = (
        f"`{' '.join(overrides)}`: {steps} steps, {tokens} tokens, seeds {seeds}. Losses in nats/token at "
        f"the end; mean ± standard deviation over {len(seeds)} seeds; differences seed by seed."
    )
    text = "\n".join(lines) + "\n"
    (out / "compare.md").write_text(f"{about}\n\n{text}", encoding="utf-8")
    content = {"arguments": overrides, "records": records}
    (out / "compare.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    from phsa_megatron.evaluation.plots import with_spread

    losses = {name: [run["values"]["val/loss_nats"] for run in runs] for name, runs in by_name.items()}
    with_spread(out / "compare.png", losses, title="validation loss, a point a seed", x_label="nats/token")
    return text


def _cell(values: list[float], sign: str = "") -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:{sign}.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")
