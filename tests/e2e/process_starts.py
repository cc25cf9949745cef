"""Training processes of random_faults.py: started as a launcher does, or forked from one process."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import traceback
import types
from pathlib import Path
from typing import BinaryIO, Protocol

import torch

from phsa_megatron.parallel import collective_trace, cpu_shim

# As the training process does, before anything imports megatron; the shim does.
collective_trace.install()
cpu_shim.install(hide_gpu=True)


class Process(Protocol):
    """What is used of a started process."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def wait(self) -> int:
        """Wait for the end."""


class Forked:
    """A forked process that looks like subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        code = self._look(0)
        assert code is not None
        return code

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def spawn(config_file: Path, variables: dict[str, str], log: BinaryIO) -> Process:
    """Start a training process as a launcher does."""
    command = [sys.executable, "-m", "phsa_megatron.train", str(config_file)]
    environment = os.environ | variables
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def import_everything() -> None:
    """What a forked process finds done."""
    torch.set_num_threads(1)
    for name in ("parallel.groups", "training.loop", "training.watchdog", "train"):
        importlib.import_module(f"phsa_megatron.{name}")


def fork(config_file: Path, variables: dict[str, str], log: BinaryIO) -> Process:
    """Start a training process from this one, after `import_everything`."""
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.environ.update(variables)
        # The small process that collects the writers' results would import the main script again.
        sys.modules["__main__"] = types.ModuleType("__main__")
        code = importlib.import_module("phsa_megatron.train").main(str(config_file))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
