"""`RUN/report.html`: one file a person can open anywhere, from a finished, stopped or still running run."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from phsa_megatron.config.errors import DataError
from phsa_megatron.config.resolved import write_atomically
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.yaml_file import read_yaml
from phsa_megatron.monitoring.console import short_count, short_time
from phsa_megatron.monitoring.metrics import lookup
from phsa_megatron.monitoring.records import Records, read_records
from phsa_megatron.monitoring.report_figures import FigureCard, figures

_MAX_EVENTS = 80
_BASELINES = {"unigram": "unigram_entropy_nats", "bigram": "bigram_entropy_nats"}


@dataclass(frozen=True)
class Fact:
    """A number at the top of the page: what it is, the number, a line of context."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class RunData:
    """What a run folder says about itself.

    Attributes:
        config: The resolved configuration as plain mappings.
        records: Metrics and events.
        summary: `summary.json`, None while there is none.
    """

    config: dict[str, Any]
    records: Records
    summary: dict[str, Any] | None

    @property
    def baselines(self) -> dict[str, float]:
        """Validation cross-entropy of the n-gram models in nats by name, as far as the run measured it."""
        known: dict[str, Any] = dict(self.summary or {})
        for event in self.records.events_of("baselines"):
            known |= event.fields
        return {name: known[key] for name, key in _BASELINES.items() if known.get(key) is not None}


def write_report(folder: RunFolder) -> Path:
    """Write the report of a run folder.

    Args:
        folder: A run folder with a resolved configuration and a metrics file; a summary is not needed.

    Returns:
        The path of the written `report.html`. It appears at once: a reader never sees half of it.

    Raises:
        ConfigError: The configuration is missing or damaged.
        DataError: The metrics are missing, or they or the summary are damaged.
    """
    data = read_run(folder)
    page = render(data)
    write_atomically(folder.report_file, page)
    return folder.report_file


def read_run(folder: RunFolder) -> RunData:
    """Read what the report shows.

    Raises:
        ConfigError: The configuration is missing or damaged.
        DataError: The metrics are missing, or they or the summary are damaged.
    """
    # The plain file, not the schema: an older run whose settings have since been renamed still gets its
    # report.
    config = read_yaml(folder.existing_config()).values
    return RunData(config, read_records(folder.metrics_file), _read_summary(folder.summary_file))


def _read_summary(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path} is not JSON ({error}): the file is damaged. Remove it to report without it."
        ) from error
    return summary


def template(name: str) -> jinja2.Template:
    """Return a page's template; what it is given is escaped unless it is marked as markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("phsa_megatron.monitoring", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(data: RunData) -> str:
    """Render the page: no script, no network, everything inside."""
    events = _event_rows(data.records)
    return template("report.html.j2").render(
        name=data.config["run"]["name"],
        subtitle=_subtitle(data.config),
        status=status(data),
        facts=_facts(data),
        figures=[shown(card) for card in figures(data.config, data.records, data.baselines)],
        samples=_samples(data.records),
        settings={group: flatten(values) for group, values in data.config.items()},
        last_values=_last_values(data.records),
        events=events[-_MAX_EVENTS:],
        num_events=len(events),
        environment=_environment(data.records),
        written_at=utc(datetime.now(UTC).timestamp()),
    )


def shown(card: FigureCard) -> dict[str, Any]:
    """Mark the drawings as markup; every other text of the page is escaped."""
    return {
        "title": card.title,
        "note": card.note,
        "wide": card.wide_svg is not None,
        "svg": Markup(card.svg),
        "wide_svg": Markup(card.wide_svg or ""),
    }


def _subtitle(config: dict[str, Any]) -> str:
    attention, model, data = config["attention"], config["model"], config["data"]
    kind = attention["kind"]
    if kind == "phsa":
        selector = attention.get("selector", "phsa")
        name = "PHSA" if selector == "phsa" else selector
        kind = f"{name}, blocks of {attention['block_tokens']}"
        if selector not in ("window", "dense_window"):
            kind += f", top-{attention['train_topk']}"
        kind += f", init {attention['init_tokens']} + local {attention['local_tokens']}"
    else:
        kind = f"{kind} attention"
    shape = f"{model['num_layers']} layers, width {model['hidden_size']}"
    return f"{kind} · {model['name']} ({shape}) · {data['name']}"


def status(data: RunData) -> dict[str, str]:
    """Tell whether the run is over; without an end it runs or was killed, which its files cannot tell."""
    if data.summary is not None:
        return {"kind": "finished", "text": "finished"}
    if not data.records.launches:
        return {"kind": "open", "text": "no record yet"}
    launch = data.records.launches[-1]
    for event in reversed(data.records.events):
        if event.time >= launch.start_time and event.kind == "error":
            return {"kind": "failed", "text": f"failed: {event.fields.get('text', 'see the log')}"}
        if event.time >= launch.start_time and event.kind == "end":
            return {"kind": "stopped", "text": f"stopped: {event.fields.get('reason', 'no reason given')}"}
    return {"kind": "open", "text": f"unfinished, last record {utc(launch.last_time)}"}


def _facts(data: RunData) -> list[Fact]:
    """Choose the numbers at the top; what the run has not measured is left out."""
    records, config = data.records, data.config
    last_step = max(records.values_by_step, default=0)
    facts = [Fact("Steps", f"{last_step:,}", f"of {config['run']['train_steps']:,}")]
    val_loss, train_loss = records.last("val/loss_nats"), records.last("train/loss_nats")
    if val_loss is not None:
        unigram = data.baselines.get("unigram")
        note = f"{val_loss / unigram:.2f} × unigram entropy" if unigram else "nats per token"
        facts.insert(0, Fact("Validation loss", f"{val_loss:.4f}", note))
    elif train_loss is not None:
        facts.insert(0, Fact("Training loss", f"{train_loss:.4f}", "nats per token, last step"))
    tokens = records.last("progress/consumed_tokens")
    if tokens is not None:
        facts.append(Fact("Tokens", short_count(tokens), f"{tokens:,.0f}"))
    num_launches = len(records.launches)
    launches = "one launch" if num_launches == 1 else f"{num_launches} launches"
    if data.summary is not None and "wall_s" in data.summary:
        facts.append(Fact("Time", short_time(data.summary["wall_s"]), f"training, {launches}"))
    elif records.launches:
        wall_s = sum(launch.last_time - launch.start_time for launch in records.launches)
        facts.append(Fact("Time", short_time(wall_s), launches))
    _, speeds = records.series("perf/tokens_per_s")
    if speeds:
        facts.append(Fact("Speed", short_count(statistics.median(speeds)), "tokens/s, median"))
    utilization = records.last("perf/mfu_selected_frac")
    if utilization is not None:
        facts.append(Fact("Utilization", f"{utilization:.1%}", "of peak, FLOPs of the run's own attention"))
    choosing = records.last("attention/frac_queries_with_more_candidates_than_k")
    if choosing is not None:
        facts.append(Fact("Queries that choose", f"{choosing:.1%}", "have more candidate blocks than k"))
    return facts


def _samples(records: Records) -> list[dict[str, str]]:
    """Return prompt and continuation of the last samples taken, one for each prompt."""
    by_prompt = {event.fields["prompt"]: event for event in records.events_of("sample")}
    return [
        {
            "prompt": prompt,
            "text": event.fields["text"],
            "step": "" if event.step is None else f"{event.step:,}",
        }
        for prompt, event in by_prompt.items()
    ]


def flatten(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return dotted keys with their values as text, in the order of the file."""
    if not isinstance(values, dict) or not values:
        return [(prefix, "null" if values is None else str(values))]
    rows = []
    for key, value in values.items():
        rows += flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return rows


def _last_values(records: Records) -> list[dict[str, str]]:
    rows = []
    for name in records.names():
        try:
            metric = lookup(name)
        except ValueError:  # Recorded by another version of the table: shown, without a meaning.
            unit, meaning = "", "not in this version's metrics table"
        else:
            unit, meaning = metric.unit, metric.meaning
        value = records.last(name)
        rows.append({"name": name, "value": f"{value:.6g}", "unit": unit, "meaning": meaning})
    return rows


def _event_rows(records: Records) -> list[dict[str, str]]:
    """Return the events as text; samples, baselines and environments have their own places."""
    rows = []
    for event in records.events:
        if event.kind in {"sample", "baselines"}:
            continue
        fields = {key: value for key, value in event.fields.items() if key != "environment"}
        words = [str(fields.pop("text"))] if "text" in fields else []
        text = ", ".join(words + [f"{key} {value}" for key, value in fields.items()])
        step = "" if event.step is None else f"{event.step:,}"
        rows.append(
            {"time": utc(event.time), "kind": event.kind.replace("_", " "), "step": step, "text": text}
        )
    return rows


def _environment(records: Records) -> list[tuple[str, str]]:
    """Return the environment of the last launch."""
    starts = records.events_of("start")
    if not starts:
        return []
    rows = []
    for key, value in starts[-1].fields.get("environment", {}).items():
        if isinstance(value, dict):
            rows += [(name, version or "not installed") for name, version in value.items()]
        else:
            rows.append((key, " ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def utc(seconds: float) -> str:
    """Return a time in seconds since 1970 for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
