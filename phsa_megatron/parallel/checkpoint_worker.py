"""What runs in the small process that collects the results of checkpoint writers.

Kept apart because a freshly started process imports it: it must not load torch or megatron.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def outlive_stop_signals() -> None:
    """Ignore the signals that ask a run to save, and end when the training process does.

    A batch system signals every process of a job. The default action would end this one, and with it the
    very save that the signal asks for. Since it then ignores polite requests, it watches its parent.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
