"""`phsa-train wandb RUN`: reads what W&B wrote offline, without a server, and compares it with records."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DataError
from phsa_megatron.config.records import NON_FINITE, LoggedRow, read_launches
from phsa_megatron.config.resolved import load
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.monitoring.metrics import LAUNCH, STEP_AXIS
from phsa_megatron.monitoring.wandb_run import stable_run_id, sync_command
from phsa_megatron.monitoring.wandb_workspace import build_workspace

_DESCRIPTION = """\
Read the offline W&B folders of a run without a server: one line a launch, whether its values are those of
metrics.jsonl, and the command that uploads all of them into one W&B run.

  phsa-train wandb RUN               what is there, and whether it is complete
  phsa-train wandb RUN --json        every row: launch, step and values, a line each
  phsa-train wandb RUN --workspace   save our layout of plots as a view of the project (needs a login)
"""


@dataclass(frozen=True)
class OfflineObject:
    """A table or a histogram that was logged at a step.

    Attributes:
        name: As it was logged.
        kind: `table` or `histogram`.
        columns: Names of a table's columns; nothing of a histogram.
        rows: A table's rows; of a histogram (lower edge, upper edge, value) of each bin.
    """

    step: int
    name: str
    kind: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class OfflineLaunch:
    """What one launch wrote for W&B.

    Attributes:
        path: `wandb/offline-run-*`.
        run_id: Of the W&B run that it belongs to.
        launch: Number of the launch, from 1; None if nothing was logged.
        rows: What was logged, in order.
        config: The configuration that is uploaded, as the launch left it.
        objects: Tables and histograms, in order.
        files: Files that are uploaded, by their names in the W&B run.
    """

    path: Path
    run_id: str
    launch: int | None
    rows: list[LoggedRow]
    config: dict[str, Any]
    objects: list[OfflineObject] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


def read_offline(wandb_dir: Path) -> list[OfflineLaunch]:
    """Return the offline launches of a run folder, in the order of their launch.

    Args:
        wandb_dir: `RUN/wandb`.

    Raises:
        DataError: W&B cannot read a folder.
    """
    launches = [_read(path) for path in sorted(wandb_dir.glob("offline-run-*")) if path.is_dir()]
    return sorted(launches, key=lambda launch: (launch.launch or 0, launch.path.name))


def _read(path: Path) -> OfflineLaunch:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise DataError(f"W&B cannot read {path}: {ended.stderr.strip() or ended.stdout.strip()}")
    records = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    run: dict[str, Any] = next((record["run"] for record in records if record["type"] == "run"), {})
    config = dict(run.get("config", {}).get("update", {}))
    rows: list[LoggedRow] = []
    objects: list[OfflineObject] = []
    files: dict[str, Path] = {}
    launch = None
    for record in records:
        if record["type"] == "config":
            config |= record["config"].get("update", {})
        if record["type"] == "files":
            names = [each["path"] for each in record["files"]["files"]]
            files |= {name: path / "files" / name for name in names}
        if record["type"] == "history" and STEP_AXIS in record["history"]["item"]:
            item = record["history"]["item"]
            launch = int(item[LAUNCH])
            rows.append(LoggedRow(int(item[STEP_AXIS]), _values(item)))
            objects += _objects(path, item)
    return OfflineLaunch(path, str(run.get("run_id", "")), launch, rows, config, objects, files)


def _objects(path: Path, item: dict[str, Any]) -> list[OfflineObject]:
    """Return the tables and histograms of a row.

    Raises:
        DataError: The file of a table is gone.
    """
    found, step = [], int(item[STEP_AXIS])
    for key, kind in item.items():
        name = key.removesuffix("._type")
        if key == name:
            continue
        if kind == "histogram":
            edges, values = item[f"{name}.bins"], item[f"{name}.values"]
            bins = [list(each) for each in zip(edges[:-1], edges[1:], values, strict=True)]
            found.append(OfflineObject(step, name, "histogram", [], bins))
        elif kind == "table-file":
            file = path / "files" / item[f"{name}.path"]
            if not file.is_file():
                raise DataError(f"{path} logged the table {name!r}, and its file {file} is gone")
            table = json.loads(file.read_text(encoding="utf-8"))
            found.append(OfflineObject(step, name, "table", table["columns"], table["data"]))
    return found


def _values(item: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row; of a table or another object its kind, such as `table-file`."""
    objects = {
        name.removesuffix("._type"): str(kind) for name, kind in item.items() if name.endswith("._type")
    }
    parts = tuple(f"{name}." for name in objects)
    numbers = {
        name: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in item.items()
        if name not in (STEP_AXIS, LAUNCH) and not name.startswith(("_", *parts))
    }
    return numbers | objects


def compare(offline: OfflineLaunch, logged: list[LoggedRow]) -> list[str]:
    """Return how what W&B has of a launch differs from what metrics.jsonl has of it; nothing if it does not.

    Numbers must be equal to the last bit. Tables and other objects are W&B's alone.
    """
    differences = []
    numbers = [
        LoggedRow(row.step, {n: v for n, v in row.values.items() if isinstance(v, int | float)})
        for row in offline.rows
    ]
    numbers = [row for row in numbers if row.values]
    if len(numbers) != len(logged):
        differences.append(f"{len(numbers)} rows in W&B, {len(logged)} in metrics.jsonl")
    for mine, theirs in zip(numbers, logged, strict=False):
        if mine.step != theirs.step:
            differences.append(f"step {mine.step} in W&B where metrics.jsonl has step {theirs.step}")
            break
        for name in sorted({*mine.values, *theirs.values}):
            a, b = mine.values.get(name), theirs.values.get(name)
            if a is None or b is None or not (a == b or (math.isnan(a) and math.isnan(b))):
                differences.append(f"step {mine.step}, {name}: {a} in W&B, {b} in metrics.jsonl")
    return differences


def main(argv: list[str]) -> int:
    """Run the command; returns 0 if W&B has what metrics.jsonl has, 1 if not.

    Raises:
        DataError: There is nothing to read, or it is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train wandb",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print every row")
    parser.add_argument("--workspace", action="store_true", help="save our layout of plots on the server")
    arguments = parser.parse_args(argv)
    folder = RunFolder(arguments.run)
    if arguments.workspace:
        workspace = build_workspace(load(folder.config_file).monitoring.wandb)
        workspace.save()
        print(workspace.url)
        return 0
    launches = read_offline(folder.wandb_dir)
    if not launches:
        raise DataError(f"{folder.wandb_dir} holds no offline run: monitoring.wandb.mode=offline writes them")
    if arguments.json:
        for launch in launches:
            for row in launch.rows:
                print(json.dumps({"launch": launch.launch, "step": row.step, "values": row.values}))
        return 0
    logged = read_launches(folder.metrics_file)
    status = 0
    for launch in launches:
        number = launch.launch or 0
        found = compare(launch, logged[number - 1] if 0 < number <= len(logged) else [])
        steps = [row.step for row in launch.rows]
        span = f"steps {min(steps)} to {max(steps)}, {len(steps)} rows" if steps else "no rows"
        verdict = "equal to metrics.jsonl" if not found else f"DIFFERS: {found[0]}"
        code = launch.config.get("code", {}).get(f"launch_{number}", "unknown code")
        print(f"launch {number}: run id {launch.run_id}, {span}, {verdict}  ({launch.path.name}; {code})")
        status |= bool(found)
    print(f"upload: {sync_command(folder.wandb_dir, stable_run_id(folder.wandb_dir))}")
    return status
