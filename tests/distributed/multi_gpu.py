"""All that several GPUs of one host have to show, in one command, the most important first.

    PYTHONPATH=.:kernels:launch python tests/distributed/multi_gpu.py --processes 2 --seconds 540

Layouts against one GPU (`multi_gpu_layouts.py`), beside them a run that goes to half the GPUs and back
(`multi_gpu_resume.py`), then times under context parallelism (`multi_gpu_timing.py`). One start of N
processes takes case after case; what hangs or fails is ended with its tracebacks in the results, and the rest
goes on in a new start. Results are written after every case. `--add` goes on from earlier ones, of other
commits too: it takes what is not there or has failed, or what `--only` names. `--size tiny` does the same
with N CPU processes and gloo. NVLink multicast stays off (`NCCL_NVLS_ENABLE=0`).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phsa_megatron.parallel import cpu_shim

cpu_shim.install()

import torch  # noqa: E402

from tests.distributed import multi_gpu_layouts, multi_gpu_page, multi_gpu_resume, multi_gpu_timing  # noqa: E402
from tests.distributed.multi_gpu_start import ROOT, cpu_threads, environments, served_store  # noqa: E402

WORKER = Path(__file__).with_name("multi_gpu_worker.py")
START_S = 90.0
"""What a start may take beyond its first case: imports, the reference and the compilation of its kernels."""
LAYOUT_S, RESUME_S = 90.0, 200.0
"""The first layouts of each kind compile kernels and open NCCL's groups; the others take seconds."""


def all_cases(processes: int, size: str, parts: list[str]) -> list[dict[str, Any]]:
    """Return the cases of a run in order; resume runs beside the layouts."""
    layouts = [
        {"kind": "layout", "name": name, "timeout_s": LAYOUT_S} for name in multi_gpu_layouts.cases(processes)
    ]
    slower = 1 if size == "gpu" else 2  # several processes on two cores
    resume = {"kind": "resume", "name": "resume", "timeout_s": slower * RESUME_S}
    times = multi_gpu_timing.cases(processes, size)
    return [case for case in (resume, *layouts, *times) if case["kind"] in parts]


def gpu_name() -> str:
    """Return the first GPU's name, without a CUDA context in this process: that takes memory."""
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


class Session:
    """The results so far, and the processes that add to them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.deadline_s = time.monotonic() + arguments.seconds
        self.report: dict[str, Any] = {
            "processes": arguments.processes, "size": arguments.size, "commit": arguments.commit,
            "device": gpu_name() if arguments.size == "gpu" else "CPU, gloo",
            "torch": str(torch.__version__), "megatron_core": version("megatron-core"),
            "cases": [], "not_run": [],
        }  # fmt: skip
        if arguments.size == "gpu":
            self.report["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if arguments.add and arguments.out.exists():
            self._go_on_from(json.loads(arguments.out.read_text()))
        self._wanted: list[str] = self.report["not_run"]
        self._resumed: tuple[dict[str, Any], Future[dict[str, Any]]] | None = None
        self._starts = 0

    def _go_on_from(self, earlier: dict[str, Any]) -> None:
        """Keep earlier results, each with the commit that it is of."""
        same = [key for key in self.report if key not in ("cases", "not_run", "commit")]
        other = [key for key in same if earlier.get(key) != self.report[key]]
        if other:
            raise SystemExit(f"--add: {self.arguments.out} is of another run; it differs in {other}")
        rows = [{"commit": earlier["commit"]} | row for row in earlier["cases"]]
        self.report = earlier | {"commit": self.arguments.commit, "cases": rows}

    def save(self) -> None:
        """Write the results and their page."""
        there = {row["name"] for row in self.report["cases"]}
        self.report["not_run"] = [name for name in self._wanted if name not in there]
        out: Path = self.arguments.out
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.report, indent=1) + "\n")
        out.with_suffix(".md").write_text(multi_gpu_page.page(self.report))

    def add(self, case: dict[str, Any], found: dict[str, Any]) -> None:
        """Take the result of a case."""
        row = {"name": case["name"], "kind": case["kind"], "commit": self.arguments.commit, **found}
        others = [old for old in self.report["cases"] if old["name"] != row["name"]]
        self.report["cases"] = [*others, row]
        self.save()
        shown = {
            k: v
            for k, v in row.items()
            if not isinstance(v, list | dict) and k not in ("name", "kind", "commit", "error")
        }
        short = {k: round(v, 5) if isinstance(v, float) else v for k, v in shown.items()}
        print(f"{case['name']}: {short} {row.get('error', '')[-1500:]}", flush=True)

    def run(self, cases: list[dict[str, Any]]) -> None:
        """Take all cases for which there is time."""
        self._wanted = list(dict.fromkeys([*self._wanted, *(case["name"] for case in cases)]))
        left = [case for case in cases if case["kind"] != "resume"]
        with ThreadPoolExecutor(1) as beside:
            for case in cases:
                if case["kind"] == "resume":
                    self._resumed = case, beside.submit(self._resume, case)
            while left and time.monotonic() < self.deadline_s - 20:
                left = left[self._one_start(left) :]
            self._end_resume()
        self.save()

    def _resume(self, case: dict[str, Any]) -> dict[str, Any]:
        size = multi_gpu_layouts.SIZES[self.arguments.size]
        began_s = time.monotonic()
        try:
            seconds = min(case["timeout_s"], self.deadline_s - began_s)
            found = multi_gpu_resume.run_case(size, self.arguments.processes, self.folder / "resume", seconds)
        except Exception as error:
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        return found | {"case_s": round(time.monotonic() - began_s, 1)}

    def _end_resume(self) -> None:
        """Wait for the run beside the layouts, if there is one: no time is taken before its end."""
        if self._resumed is not None:
            case, future = self._resumed
            self._resumed = None
            self.add(case, future.result())

    def _one_start(self, cases: list[dict[str, Any]]) -> int:
        """Start all processes for these cases; return how many of them are dealt with."""
        self._starts += 1
        folder = self.folder / f"start_{self._starts}"
        folder.mkdir(parents=True)
        running = self._start(cases, folder)
        try:
            for number, case in enumerate(cases):
                if case["kind"] == "timing":
                    self._end_resume()
                    (folder / "quiet").touch()
                allowed_s = case["timeout_s"] + (0 if number else START_S)
                end_s = min(time.monotonic() + allowed_s, self.deadline_s)
                found = self._wait(case["name"], running, folder, end_s)
                if "error" in found and time.monotonic() >= self.deadline_s:
                    return number  # there was no time for it: it is among those not run
                self.add(case, found)
                if "error" in found:
                    return number + 1
            return len(cases)
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start(self, cases: list[dict[str, Any]], folder: Path) -> list[subprocess.Popen[bytes]]:
        processes = self.arguments.processes
        job = {"size": self.arguments.size, "processes": processes, "folder": str(folder), "cases": cases}
        (folder / "job.json").write_text(json.dumps(job))
        self._store = served_store()
        threads = cpu_threads(processes, on_gpus=self.arguments.size == "gpu")
        running = []
        for rank, environment in enumerate(environments(processes, self._store.port, threads)):
            with (folder / f"log.{rank}").open("w") as log:
                command = [sys.executable, str(WORKER), str(folder / "job.json")]
                running.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        return running

    def _wait(self, name: str, running: list[Any], folder: Path, end_s: float) -> dict[str, Any]:
        """Return what process 0 found, or everybody's traceback."""
        paths = [folder / f"{name}.{rank}.json" for rank in range(len(running))]
        while not all(path.exists() for path in paths):
            failed = any(process.poll() for process in running)
            if failed:
                time.sleep(1.0)  # for the others' tracebacks, if they have the same trouble
            if failed or time.monotonic() > end_s:
                return {"passed": False, "error": self._tracebacks(name, folder, failed)}
            time.sleep(0.02)
        found = [json.loads(path.read_text()) for path in paths]
        errors = [one["error"] for one in found if "error" in one]
        return {"passed": False, "error": "\n".join(errors)} if errors else found[0]

    def _tracebacks(self, name: str, folder: Path, failed: bool) -> str:
        lines = ["a process failed" if failed else "no result in time"]
        for rank in range(self.arguments.processes):
            for path in (
                folder / f"{name}.{rank}.json",
                folder / f"{name}.{rank}.stack",
                folder / f"log.{rank}",
            ):
                text = path.read_text() if path.exists() else ""
                if path.suffix == ".json" and text:
                    text = json.loads(text).get("error", "")
                if text:
                    lines.append(f"--- rank {rank}, {path.name}\n{text[-8000:]}")
        return "\n".join(lines)


def passed(row: dict[str, Any]) -> bool:
    """Return whether a case has passed; a time has if it was taken."""
    return bool(row.get("passed", "error" not in row))


def to_run(cases: list[dict[str, Any]], only: list[str] | None, earlier: Path | None) -> list[dict[str, Any]]:
    """Return the cases to run: those of `only`, or those that have not passed in the results of `earlier`.

    A person may give a row `again: true`, and say why in `note`.
    """
    if only:
        return [case for case in cases if case["name"] in only]
    rows = json.loads(earlier.read_text())["cases"] if earlier and earlier.exists() else []
    there = {row["name"] for row in rows if passed(row) and not row.get("again")}
    return [case for case in cases if case["name"] not in there]


def parser() -> argparse.ArgumentParser:
    """Return what the command understands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--size", choices=sorted(multi_gpu_layouts.SIZES), default="gpu")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--parts", nargs="+", default=["layout", "timing", "resume"])
    parser.add_argument("--only", nargs="+", help="names of cases, instead of all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "multi_gpu.json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--add", action="store_true", help="what --out does not hold as passed")
    parser.add_argument("--list", action="store_true", help="print the cases and leave")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what there is time for."""
    arguments = parser().parse_args(argv)
    cases = all_cases(arguments.processes, arguments.size, arguments.parts)
    cases = to_run(cases, arguments.only, arguments.out if arguments.add else None)
    if arguments.list:
        print("\n".join(case["name"] for case in cases))
        return 0
    with tempfile.TemporaryDirectory(prefix="phsa_multi_gpu_") as folder:
        session = Session(arguments, Path(folder))
        session.run(cases)
    print(f"not run: {session.report['not_run']}", flush=True)
    rows = session.report["cases"]
    return 0 if rows and all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
