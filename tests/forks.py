"""Processes for tests that start in milliseconds: forks of one process that has torch and megatron loaded.

A start of python that imports both takes three to four seconds of a core. Where a test asks what a process
does, not how its command starts, it runs as a fork: with its own environment, session, output files and exit
code, and nothing in it that another test left behind. One server of forks serves a test process. Forks end
without python's `atexit`, as all processes of `multiprocessing` do.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 20.0
"""How long ranks may go on when one of them has failed."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.forks_preloaded"])


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment and what one of this checkout needs; no rank of another run."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
    return mine | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


class Fork:
    """One process, with what tests use of `subprocess.Popen`; its output is text.

    Args:
        call: "module:function", which may return an exit code; or the path of a script, run as `__main__`.
        arguments: of the function; of a script, its command line.
        variables: its whole environment.
    """

    def __init__(self, call: str | Path, arguments: Sequence[Any], variables: dict[str, str]) -> None:
        _start_server()
        self._folder = tempfile.TemporaryDirectory(prefix="fork-")
        self._outputs = [str(Path(self._folder.name) / name) for name in ("out", "err")]
        self._process = _CONTEXT.Process(target=_main, args=(call, arguments, variables, self._outputs))
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal's number if one ended it, None while it runs."""
        return self._process.exitcode

    def output(self) -> tuple[str, str]:
        """Return what it has written so far to stdout and to stderr."""
        paths = map(Path, self._outputs)
        return tuple(p.read_text(errors="replace") if p.exists() else "" for p in paths)  # type: ignore[return-value]

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end and return the output; a TimeoutError shows what there is of it."""
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"a process did not end within {timeout:.0f} s: {self.output()}")
        return self.output()

    def kill(self) -> None:
        """End it with its children, and forget its output."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._folder.cleanup()


def run(call: str | Path, *arguments: Any, timeout: float = 200, **more: str) -> tuple[int, str, str]:
    """Run one fork without a rank; return its exit code and what it wrote to stdout and to stderr."""
    (ended,) = _run([Fork(call, arguments, environment(**more))], timeout)
    return ended


def run_ranks(
    processes: int, call: str | Path, *arguments: Any, timeout: float = 400, **more: str
) -> list[tuple[int, str, str]]:
    """Run the ranks of one run, as torchrun starts them on one host; return what `run` does for each.

    The store in which they meet is served here, as torchrun's agent does. If one fails, the others have
    GRACE_S seconds to end.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = environment(**more) | {
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _run([Fork(call, arguments, variables) for variables in ranks], timeout)


def _run(forks: list[Fork], timeout: float) -> list[tuple[int, str, str]]:
    end_s = time.monotonic() + timeout
    running = forks
    try:
        while running and time.monotonic() < end_s:
            connection.wait([fork.sentinel for fork in running], end_s - time.monotonic())
            running = [fork for fork in forks if fork.returncode is None]
            if any(fork.returncode for fork in forks):
                end_s = min(end_s, time.monotonic() + GRACE_S)
        return [(-signal.SIGKILL if f.returncode is None else f.returncode, *f.output()) for f in forks]
    finally:
        for fork in forks:
            fork.kill()


def _start_server() -> None:
    """Start the server of forks where there is none yet, with this checkout and one thread for each."""
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _main(call: str | Path, arguments: Sequence[Any], variables: dict[str, str], outputs: list[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if isinstance(call, Path):
        sys.argv = [str(call), *map(str, arguments)]
        runpy.run_path(str(call), run_name="__main__")
    else:
        module, function = call.split(":")
        sys.exit(getattr(importlib.import_module(module), function)(*arguments))
