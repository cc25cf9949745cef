"""Requests to save or to leave, from the operating system or from a person, agreed by all processes.

`touch RUN/save` saves and goes on. `touch RUN/exit`, SIGTERM and SIGUSR1 save and leave.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RequestFiles(Protocol):
    """The part of a run folder that is read here."""

    @property
    def save_request(self) -> Path:
        """RUN/save."""

    @property
    def exit_request(self) -> Path:
        """RUN/exit."""


class Agreement(Protocol):
    """The part of the process groups that is used here."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is true on any process; all processes call it."""


@dataclass(frozen=True)
class StopRequest:
    """What all processes agreed to do; false when nothing was asked.

    Attributes:
        save: save now. True whenever `exit` is.
        exit: leave after that save.
        reason: who asked, for the log.
    """

    save: bool = False
    exit: bool = False
    reason: str = ""

    def __bool__(self) -> bool:
        return self.save or self.exit


class StopSignals:
    """Context manager that turns signals and touch files into a request all processes see at once.

    A handler only sets a flag: it is safe in the middle of anything, and the loop decides when to look.
    Processes forked by this one (checkpoint writers) inherit the handler, so a signal sent to the whole
    process group does not kill the save that it asks for.

    A touch file is removed when it is seen: from then on the request lives here. An exit stays asked
    until the process ends; a save is asked once.

    Args:
        folder: where the touch files appear; only process 0 looks.
        groups: for the agreement.
    """

    def __init__(self, folder: RequestFiles, groups: Agreement) -> None:
        self._folder = folder
        self._groups = groups
        self._received: dict[signal.Signals, bool] = dict.fromkeys(HANDLED_SIGNALS, False)
        self._save_file_seen = False
        self._exit_file_seen = False
        self._leaving: StopRequest | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "StopSignals must be entered in the main thread: only it may set signal handlers"
            )
        for number in HANDLED_SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received[signal.Signals(number)] = True

    def _take_files(self) -> None:
        if self._groups.rank != 0:
            return
        if self._folder.save_request.exists():
            self._save_file_seen = True
            self._folder.save_request.unlink(missing_ok=True)
        if self._folder.exit_request.exists():
            self._exit_file_seen = True
            self._folder.exit_request.unlink(missing_ok=True)

    def requested_locally(self) -> bool:
        """Whether this process knows of a reason to leave; no communication.

        For places where processes wait each on their own (data). To act on it together, `poll`.
        """
        if self._leaving is not None or any(self._received.values()) or self._exit_file_seen:
            return True
        return self._groups.rank == 0 and self._folder.exit_request.exists()

    def leave_requested(self) -> bool:
        """Whether to leave as soon as possible, the same answer on every process; all processes call it.

        For long work between two polls (evaluation): a wish to only save is kept for the next `poll`.
        """
        if self._leaving is not None:
            return True
        self._take_files()
        return self._groups.any_true(self._exit_file_seen or any(self._received.values()))

    def poll(self) -> StopRequest:
        """What to do now, the same answer on every process; all processes call it at the same place.

        Costs one all-reduce of one number, and two looks at the folder on process 0; four more
        all-reduces when something was asked.
        """
        if self._leaving is not None:
            return self._leaving
        self._take_files()
        mine = (self._save_file_seen, self._exit_file_seen, *self._received.values())
        if not self._groups.any_true(any(mine)):
            return StopRequest()
        names = ("RUN/save", "RUN/exit", *(number.name for number in HANDLED_SIGNALS))
        asked = [name for name, flag in zip(names, mine, strict=True) if self._groups.any_true(flag)]
        self._save_file_seen = False
        leave = any(name != "RUN/save" for name in asked)
        request = StopRequest(save=True, exit=leave, reason=" and ".join(asked))
        if leave:
            self._leaving = request
        return request
