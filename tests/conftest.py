"""Installs the CPU shim before any test imports megatron; tiny recipes; single-process groups."""
# ruff: noqa: E402 - the shim comes before everything that may import megatron

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from phsa_megatron.parallel import cpu_shim

cpu_shim.install()

import gc
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass

import pytest
import torch

from phsa_megatron.config.schema import Dtype, TrainConfig
from phsa_megatron.parallel.groups import Groups, initialize

torch.set_num_threads(1)
MORE_THREADS = 200
_left_threads = [0]
"""How many were left by the last collection."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """End the threads of closed groups: gloo's go when a model that holds the groups is collected.

    Python's collector alone lets thousands gather in a test process, and each wakes up a hundred times a
    second.
    """
    if len(os.listdir("/proc/self/task")) > _left_threads[0] + MORE_THREADS:
        gc.collect()
        _left_threads[0] = len(os.listdir("/proc/self/task"))


@pytest.fixture
def single_process_groups() -> Iterator[Groups]:
    """Groups of one gloo process, taken down afterwards. The store lives in memory: no port, no file."""
    groups = initialize(TrainConfig())
    yield groups
    groups.close()


def _tiny_config(**overrides: object) -> TrainConfig:
    config = TrainConfig()
    config.run.dtype = Dtype.fp32
    model, attention = config.model, config.attention
    model.num_layers, model.hidden_size, model.ffn_hidden_size = 2, 48, 64
    model.num_query_heads, model.num_kv_heads, model.head_dim = 6, 2, 8
    model.vocab_size, model.vocab_pad_multiple = 100, 16
    attention.block_tokens, attention.init_tokens, attention.local_tokens = 4, 4, 8
    config.data.seq_len_tokens = 64
    for key, value in overrides.items():
        section, name = key.split("__")
        target = getattr(config, section)
        assert is_dataclass(target) and name in {field.name for field in fields(target)}, key
        setattr(target, name, value)
    return config


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TrainConfig]:
    """Returns a builder of small fp32 recipes: `tiny_config(attention__train_topk=1)`."""
    return _tiny_config
