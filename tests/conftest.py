"""Installs the CPU shim before any test imports megatron, and starts single-process groups."""
# ruff: noqa: E402 - the shim comes before everything that may import megatron

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from phsa_megatron.parallel import cpu_shim

cpu_shim.install()

from collections.abc import Iterator

import pytest
import torch

from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.parallel.groups import Groups, initialize

torch.set_num_threads(1)


@pytest.fixture
def single_process_groups() -> Iterator[Groups]:
    """Groups of one gloo process, taken down afterwards. The store lives in memory: no port, no file."""
    groups = initialize(TrainConfig())
    yield groups
    groups.close()
