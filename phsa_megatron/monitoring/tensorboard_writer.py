"""Metrics for TensorBoard, beside metrics.jsonl: a second look at the same numbers, by recipe."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import DeviceError

_LOG = logging.getLogger(__name__)


class TensorBoardWriter:
    """Writes scalars into `RUN/tensorboard`, a file of events for each launch; never raises once started.

    Args:
        folder: Where the events go.

    Raises:
        DeviceError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise DeviceError(
                f"monitoring.tensorboard=true needs the package tensorboard, which cannot be imported "
                f"({error}). Install it with: pip install 'phsa-megatron[tensorboard]', or set "
                "monitoring.tensorboard=false."
            ) from error
        self._module, self._folder = module, folder
        self._writer: Any = None
        self._failed = False

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write values at a step; a failure is said once, and then TensorBoard is left alone."""
        if self._failed:
            return
        try:
            if self._writer is None:
                # What an earlier launch wrote of this step and later ones was made again: it is hidden.
                self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except Exception as error:  # Whatever happens here, metrics.jsonl is complete.
            self._failed = True
            _LOG.warning("TensorBoard gets no more values from this launch: %s", error)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()
