"""`phsa-train preflight`, `python -m phsa_megatron.preflight`: one node's checks, table and verdict.

Exit codes: 0 this node is good, 3 it is bad, 4 it could not be checked or others are missing: docs/health.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phsa_megatron.config import compose
from phsa_megatron.config.errors import DeviceError, PhsaError
from phsa_megatron.config.exit_codes import NODE_BAD, NODE_UNCHECKED
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.config.validate import validate
from phsa_megatron.preflight import checks, compare, facts
from phsa_megatron.preflight.all_reduce import NAMES as ALL_REDUCE_NAMES
from phsa_megatron.preflight.all_reduce import check_all_reduce
from phsa_megatron.preflight.checks import Check, Status
from phsa_megatron.preflight.gpus import NAMES as GPU_NAMES
from phsa_megatron.preflight.gpus import check_gpus
from phsa_megatron.preflight.nodes import MissingNodesError, Nodes, Place, own_name

_DESCRIPTION = """\
Check this node before a run's first step, together with the run's other nodes: GPUs, memory, disk, clocks,
versions, a short all-reduce. Once per node; the batch script says with PHSA_NODE_RANK, PHSA_NUM_NODES,
PHSA_MASTER_ADDR and PHSA_MASTER_PORT which node this is, and without them it is the only one.

  phsa-train preflight recipe=phsa_demo_cpu
  phsa-train preflight RUN/config.yaml

Exit codes: 0 good, 3 this node is bad (RUN/bad_nodes names it), 4 it could not be checked.
"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="phsa-train preflight",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", nargs="+", metavar="RUN/config.yaml | KEY=VALUE", help="a resolved file, or recipe=NAME ..."
    )
    parser.add_argument(
        "--recipes-dir", type=Path, help="your own folder of recipes, beside the built-in ones"
    )
    arguments = parser.parse_intermixed_args(argv)
    words = arguments.run
    try:
        if len(words) == 1 and "=" not in words[0]:
            config = compose.load(words[0])
        else:
            config = compose.compose(words, arguments.recipes_dir).config
        validate(config)
        place = Place.from_environment()
        folder = RunFolder.of(config)
        folder.preflight_dir.mkdir(parents=True, exist_ok=True)
    except (PhsaError, OSError) as error:
        print(f"preflight: {error}", file=sys.stderr)
        return NODE_UNCHECKED
    return Preflight(config, folder, place).run()


class Preflight:
    """One node's preflight.

    Args:
        config: settings of the run.
        folder: its folder, which exists.
        place: this node among all.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, place: Place) -> None:
        self._config, self._folder, self._place = config, folder, place
        self._node = own_name()
        self._checks: list[Check] = []
        self._facts: dict[str, str] = {}
        self._began_s = time.monotonic()

    def run(self) -> int:
        """Make all checks, write and print what was found, and return the exit code."""
        try:
            with Nodes(self._place, self._config.health.preflight_timeout_s) as nodes:
                self._check(nodes)
        except MissingNodesError as error:
            self._checks.append(Check("nodes", Status.unknown, str(error)))
            if error.reporter == self._place.node_rank:
                for name in error.names:
                    self._add_bad_node(name, "it did not come to the preflight")
        except DeviceError as error:
            self._checks.append(Check("nodes", Status.unknown, str(error)))
        code = self._exit_code()
        bad = [check.reason() for check in self._checks if check.status is Status.bad]
        if bad:
            self._add_bad_node(self._node, "; ".join(bad))
        self._write(code)
        self._print(code)
        return code

    def _check(self, nodes: Nodes) -> None:
        names = nodes.meet()
        health = self._config.health
        self._facts = facts.collect()
        try:
            self._checks += check_gpus(self._config)
        except DeviceError as error:
            self._checks += [Check(name, Status.unknown, str(error)) for name in GPU_NAMES[:1]]
        self._checks.append(checks.memory(health))
        self._checks += checks.disk(self._folder.path, self._node, health)
        offsets_s = nodes.clock_offsets_s()
        self._checks.append(compare.clocks(offsets_s, self._place.node_rank, health.max_clock_skew_s))
        everyone = nodes.exchange("facts", self._facts)
        self._checks.append(compare.versions(everyone, self._place.node_rank))
        verdicts = nodes.exchange("verdict", self._exit_code())
        unfit = [names[rank] for rank, code in verdicts.items() if code]
        if unfit:
            found = f"not tried: {', '.join(unfit)} did not pass"
            self._checks += [Check(name, Status.not_applicable, found) for name in ALL_REDUCE_NAMES]
            return
        self._checks += check_all_reduce(self._config, nodes)

    def _exit_code(self) -> int:
        statuses = {check.status for check in self._checks}
        if Status.bad in statuses:
            return NODE_BAD
        return NODE_UNCHECKED if Status.unknown in statuses else 0

    def _add_bad_node(self, name: str, reason: str) -> None:
        """Append to RUN/bad_nodes, which the batch script reads; a node that is there already stays."""
        path = self._folder.bad_nodes
        try:
            known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            if any(line.split("\t")[0] == name for line in known):
                return
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, f"{name}\t{' '.join(reason.split())}\n".encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            print(f"preflight: {path} could not be written: {error}", file=sys.stderr)

    def _write(self, code: int) -> None:
        record = {
            "host": self._node,
            "node_rank": self._place.node_rank,
            "num_nodes": self._place.num_nodes,
            "exit_code": code,
            "checks": [asdict(check) for check in self._checks],
            "facts": self._facts,
            "seconds": round(time.monotonic() - self._began_s, 3),
            "time_unix_s": time.time(),
        }
        path = self._folder.preflight_dir / f"{self._node}.json"
        try:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            print(f"preflight: {path} could not be written: {error}", file=sys.stderr)

    def _print(self, code: int) -> None:
        colors = {
            Status.ok: "green",
            Status.bad: "red",
            Status.unknown: "yellow",
            Status.not_applicable: "dim",
        }
        place = self._place
        title = f"preflight of {self._node}, node {place.node_rank} of {place.num_nodes}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE)
        for column in ("", "what", "found", "rule"):
            table.add_column(column, overflow="fold")
        for check in self._checks:
            color = colors[check.status]
            table.add_row(f"[{color}]{check.status}[/]", check.name, escape(check.found), escape(check.rule))
        # Without a terminal rich assumes 80 columns; a batch log is read wide.
        console = Console(width=None if sys.stdout.isatty() else 150)
        if code or place.node_rank == 0:  # a table for each of many good nodes would hide the bad one's
            console.print(table)
        seconds = time.monotonic() - self._began_s
        verdict = {
            0: "is good",
            NODE_BAD: f"is BAD and must not take part; written to {self._folder.bad_nodes}",
            NODE_UNCHECKED: "could not be checked",
        }[code]
        console.print(escape(f"{self._node} {verdict} ({seconds:.1f} s)"))
