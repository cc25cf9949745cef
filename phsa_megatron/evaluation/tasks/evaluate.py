"""Ask one model every task that was chosen, sample by sample, and sum up what it answered."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks import confidence, general, longbench, perplexity
from phsa_megatron.evaluation.tasks.long_context import HAS_DEPTH, LONG_TASKS, make_sample
from phsa_megatron.evaluation.tasks.model_view import View
from phsa_megatron.evaluation.tasks.samples import Key, Samples
from phsa_megatron.evaluation.tasks.settings import PERPLEXITY, EvalSettings

Record = dict[str, Any]
Tell = Callable[[str, int, int], None]
"""Takes what is being asked, how many of it are done, and how many there are."""


def check(settings: EvalSettings) -> None:
    """Refuse missing data before a model is opened.

    Raises:
        PhsaError: a file or a folder is missing.
    """
    chosen = settings.chosen
    for name in chosen:
        if name in longbench.DATASETS:
            longbench.read(_path(settings.longbench_dir), name, 1)
    longbench.read_prompts(_path(settings.longbench_prompts))
    wanted = [name for name in chosen if name in general.GENERAL_TASKS]
    if wanted or _own_tasks(settings):
        general.check_data(_path(settings.data_dir), wanted)
    if PERPLEXITY in chosen:
        next(perplexity.read_texts(_path(settings.texts_dir)), None)
    if settings.haystack is not None:
        read_haystack(Path(settings.haystack))


def evaluate(view: View, settings: EvalSettings, samples: Samples, tell: Tell) -> list[Record]:
    """Return the records of one view of a model.

    Args:
        view: asked.
        settings: what is asked.
        samples: of long tasks, LongBench and perplexity; finished ones are not asked again.
        tell: hears of each sample.

    Raises:
        PhsaError: a text is longer than the model takes, or data is missing.
    """
    records: list[Record] = []
    longest, most = max(settings.lengths), view.answerer.max_tokens
    if longest > most and {*LONG_TASKS, PERPLEXITY} & set(settings.chosen):
        raise ConfigError(
            f"lengths={settings.lengths}: {view.answerer.name} takes texts of up to {most:,} tokens; ask for "
            f"shorter ones, or go beyond what it was trained with by max_tokens={longest}"
        )
    for name in settings.chosen:
        if name in LONG_TASKS:
            records += _long(view, name, settings, samples, tell)
        elif name in longbench.DATASETS:
            records.append(_longbench(view, name, settings, samples, tell))
        elif name == PERPLEXITY:
            records += _perplexity(view, settings, samples, tell)
    wanted = [name for name in settings.chosen if name in general.GENERAL_TASKS] + _own_tasks(settings)
    if wanted:
        records += _general(view, wanted, settings, tell)
    return records


def _own_tasks(settings: EvalSettings) -> list[str]:
    known = {*LONG_TASKS, PERPLEXITY, *longbench.DATASETS, *general.GENERAL_TASKS}
    return [name for name in settings.chosen if name not in known]


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def read_haystack(file: Path) -> list[str]:
    """Return the sentences of a text.

    Raises:
        ConfigError: it cannot be read, or is empty.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"haystack={file} cannot be read: {error.strerror}") from None
    found = [part for part in re.split(r"(?<=[.!?。！？])\s+|\n\s*\n", text) if part.strip()]
    if not found:
        raise ConfigError(f"haystack={file} is empty")
    return found


def _long(view: View, task: str, settings: EvalSettings, samples: Samples, tell: Tell) -> Iterator[Record]:
    haystack, digest = None, None
    if settings.haystack is not None:
        haystack = read_haystack(Path(settings.haystack))
        digest = hashlib.sha256("\n".join(haystack).encode()).hexdigest()[:16]
    depths: list[float | None] = list(settings.depths) if task in HAS_DEPTH else [None]
    numbers = range(1, settings.trials + 1)
    for length in settings.lengths:
        todo = list(product(depths, settings.seeds, numbers))
        found: dict[Key, Record] = {}
        for done, (depth, seed, trial) in enumerate(todo, start=1):
            key = (*view.key, task, length, depth, seed, trial, digest)
            record = samples.get(key)
            if record is None:
                sample = make_sample(
                    task,
                    view.answerer.encode,
                    length,
                    seed=seed,
                    trial=trial,
                    depth_frac=0.5 if depth is None else depth,
                    haystack=haystack,
                )
                answer = view.answerer.generate([sample.prompt], sample.max_new_tokens)[0]
                values = {"score": sample.score(answer), "answer": answer, "expected": sample.expected}
                record = samples.add(key, values)
            found[(depth, seed, trial)] = record
            tell(f"{view.answerer.name}: {task} at {length:,}", done, len(todo))
        scores = {place: float(record["score"]) for place, record in found.items()}
        about = {"task": task, "length": length, "metric": "recall"}
        yield _record(view, about | {"depth": None}, scores, settings)
        for depth in depths if task in HAS_DEPTH else ():
            at = {place: score for place, score in scores.items() if place[0] == depth}
            yield _record(view, about | {"depth": depth}, at, settings)


def _record(view: View, about: Record, scores: dict[Key, float], settings: EvalSettings) -> Record:
    """Return the summary of scores by (depth, seed, trial)."""
    by_seed = {
        seed: math.fsum(own) / len(own)
        for seed in settings.seeds
        if (own := [score for place, score in scores.items() if place[1] == seed])
    }
    interval = confidence.of_scores(list(scores.values()))
    return {
        **view.labels,
        **about,
        **interval._asdict(),
        "num_samples": len(scores),
        "by_seed": by_seed,
    }


def _longbench(view: View, name: str, settings: EvalSettings, samples: Samples, tell: Tell) -> Record:
    records = longbench.read(_path(settings.longbench_dir), name, settings.limit)
    prompt = longbench.read_prompts(_path(settings.longbench_prompts))[name]
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    scores = []
    for number, record in enumerate(records, start=1):
        key = (*view.key, name, record.get("_id", number), digest, view.answerer.max_tokens)
        found = samples.get(key)
        if found is None:
            answer, score = next(longbench.ask(view.answerer, name, [record], prompt))
            found = samples.add(key, {"score": score, "answer": answer, "expected": record["answers"]})
        scores.append(float(found["score"]))
        tell(f"{view.answerer.name}: {name}", number, len(records))
    about = {"task": name, "group": "longbench", "metric": longbench.DATASETS[name].metric.__name__}
    return {**view.labels, **about, **confidence.of_scores(scores)._asdict(), "num_samples": len(scores)}


def _perplexity(view: View, settings: EvalSettings, samples: Samples, tell: Tell) -> Iterator[Record]:
    bounds = perplexity.edges(max(settings.lengths))
    texts = list(perplexity.read_texts(_path(settings.texts_dir)))[: settings.limit]
    parts: list[list[float]] = []
    for number, (name, text) in enumerate(texts, start=1):
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        key = (*view.key, PERPLEXITY, name, digest, bounds[-1])
        found = samples.get(key)
        if found is None:
            own = perplexity.by_position(view.answerer, text, bounds)
            found = samples.add(key, {"parts": [list(part) for part in own]})
        parts += found["parts"]
        tell(f"{view.answerer.name}: {PERPLEXITY}", number, len(texts))
    for first, end in zip(bounds, bounds[1:], strict=False):
        own_parts = [part for part in parts if part[0] == first]
        if own_parts:
            nats, tokens = [part[2] for part in own_parts], [part[3] for part in own_parts]
            interval = confidence.of_ratio(nats, tokens)
            about = {"task": PERPLEXITY, "metric": "nats/token", "first": first, "end": end}
            yield {
                **view.labels,
                **about,
                **interval._asdict(),
                "perplexity": math.exp(interval.mean),
                "num_samples": len(own_parts),
            }


def _general(view: View, names: list[str], settings: EvalSettings, tell: Tell) -> Iterator[Record]:
    data_dir = _path(settings.data_dir)
    assert data_dir is not None  # checked before
    for done, seed in enumerate(settings.seeds, start=1):
        results = general.run(
            view.answerer,
            names,
            data_dir,
            limit=settings.limit,
            seed=seed,
            allow_code=settings.allow_code,
            include_dir=_path(settings.include_dir),
        )
        tell(f"{view.answerer.name}: general tasks, seed {seed}", done, len(settings.seeds))
        for found in results:
            low, high = general.interval(found) or (math.nan, math.nan)
            yield {
                **view.labels,
                "task": found.task,
                "group": "general",
                "metric": found.metric,
                "seed": seed,
                "mean": found.value,
                "low": low,
                "high": high,
                "method": "lm-eval's standard error",
                "num_samples": found.num_samples,
            }
