"""The bytes that a context-parallel process copies, as torch is called, against those of the plan."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phsa_megatron.attention import context_parallel
from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.context_copies import context_copies, copied_frac
from phsa_megatron.config.schema import (
    ContextExchange,
    ContextSharding,
    Dtype,
    PunctuationLanguage,
    PunctuationMatch,
)
from phsa_megatron.parallel.exchange import ContextGroups

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
SIZE, S, M, RANK = 4, 4096, 8, 1
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)


def _bytes(x):
    return x.numel() * x.element_size()


# What an operation reads and writes, of (its arguments, its result).
MOVED = {
    "cat": lambda args, out: 2 * _bytes(out),
    "stack": lambda args, out: 2 * _bytes(out),
    "clone": lambda args, out: 2 * _bytes(out),
    "index_select": lambda args, out: 2 * _bytes(out),
    "masked_fill_": lambda args, out: 2 * _bytes(out),
    "copy_": lambda args, out: 2 * _bytes(out),
    "_foreach_copy_": lambda args, out: 2 * sum(_bytes(x) for x in args[0]),
    "_to_copy": lambda args, out: _bytes(args[0]) + _bytes(out),
    "new_zeros": lambda args, out: _bytes(out),
    "index_add_": lambda args, out: 3 * _bytes(args[3]),
}
FREE = {
    "new_empty", "empty", "empty_like", "detach", "view", "unbind", "select", "slice", "split", "alias",
    "unsqueeze",
}  # fmt: skip


class Copies(TorchDispatchMode):
    """Adds up what operations on many keys move; one that is not known here fails."""

    def __init__(self, least_bytes):
        super().__init__()
        self.least_bytes, self.num_bytes = least_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        result = args[0][0] if name == "_foreach_copy_" else out
        if not isinstance(result, torch.Tensor) or not result.is_floating_point() or name in FREE:
            return out
        if name in MOVED:
            moved = MOVED[name](args, out)
            self.num_bytes += moved if moved >= self.least_bytes else 0
        else:
            assert _bytes(result) < self.least_bytes, f"{name} is not counted"
        return out


@pytest.fixture(scope="module")
def replay():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("context_replay", BENCHMARKS / "context_replay.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module.Replay(SIZE)
    finally:
        sys.path.remove(str(BENCHMARKS))


def _config(tiny_config, rows, exchange, sharding, dtype):
    return tiny_config(
        data__seq_len_tokens=S,
        attention__block_tokens=M,
        attention__init_tokens=M,
        attention__local_tokens=2 * M,
        attention__dense_len_tokens=0,
        optim__micro_batch_sequences=rows,
        optim__global_batch_sequences=rows,
        cluster__processes_per_node=SIZE,
        parallel__context_size=SIZE,
        parallel__context_exchange=exchange,
        parallel__context_sharding=sharding,
        run__dtype=dtype,
    )


WAYS = [
    (1, ContextExchange.all_gather, ContextSharding.zigzag),
    (1, ContextExchange.all_gather, ContextSharding.contiguous),
    (2, ContextExchange.all_gather, ContextSharding.zigzag),
    (1, ContextExchange.block_sparse, ContextSharding.zigzag),
]


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp32])
@pytest.mark.parametrize(("rows", "exchange", "sharding"), WAYS)
def test_copied_bytes_are_those_of_the_formula(
    tiny_config, replay, monkeypatch, rows, exchange, sharding, dtype
):
    config = _config(tiny_config, rows, exchange, sharding, dtype)
    torch_dtype = torch.bfloat16 if dtype == Dtype.bf16 else torch.float32
    width = (config.model.num_kv_heads, config.model.head_dim)
    groups, tokens = ContextGroups.of(replay.collection()), rows * S // SIZE
    shard = ContextShard(groups, rows, S, sharding, exchange)
    bounds = torch.arange(rows + 1, dtype=torch.int32) * S
    info = [
        SideInfo.build(torch.zeros(rows, S, dtype=torch.long), bounds, TABLE, config.attention, topk=1)
        for _ in range(SIZE)
    ]
    # Every block is needed by everybody, which is what the plan takes for granted.
    everything = torch.arange(S // M, dtype=torch.int32).expand(tokens, width[0], -1)
    slots = torch.zeros(tokens // M, width[0], 1, width[1], dtype=torch_dtype)
    monkeypatch.setattr(context_parallel, "pool", lambda *_, **__: slots)

    def passes(count):
        key, value = (torch.ones(tokens, *width, dtype=torch_dtype, requires_grad=True) for _ in range(2))
        side_info = info[replay.rank]
        with count or nullcontext():
            shard.gather_pooled(key.detach(), side_info, config.attention)
            gathering = shard.start_keys_and_values(key, value)
            keys, values, _ = shard.keys_and_values(key, value, gathering, everything, side_info)
        forward = count.num_bytes if count else 0
        upstream = torch.ones_like(keys), torch.ones_like(values)
        with count or nullcontext():
            torch.autograd.grad((keys, values), (key, value), upstream)
        return forward

    own = tokens * width[0] * width[1] * slots.element_size()
    replay.record(lambda: passes(None))
    with replay.playing(RANK) as start:
        start()
        counted = Copies(own // 2)  # chunk starts are far below, pooled keys above
        forward = passes(counted)
    expected = context_copies(config)
    boundary = 2 * 2 * rows * (M - 1) * own // tokens  # joined with own keys
    assert forward == expected.forward_bytes + boundary
    cleared = 2 * SIZE * own if exchange == ContextExchange.block_sparse else 0  # by the kernels, not here
    assert counted.num_bytes - forward == expected.backward_bytes - cleared


def test_contiguous_rows_copy_nothing_of_others_and_zigzag_half(tiny_config):
    zigzag, contiguous = (
        _config(tiny_config, 1, ContextExchange.all_gather, sharding, Dtype.bf16)
        for sharding in (ContextSharding.zigzag, ContextSharding.contiguous)
    )
    assert (copied_frac(zigzag), copied_frac(contiguous)) == (0.5, 0.0)
    assert context_copies(contiguous).backward_bytes == 0 < context_copies(zigzag).backward_bytes
    assert copied_frac(_config(tiny_config, 2, *WAYS[1][1:], Dtype.bf16)) == 1.0
    alone = tiny_config()
    assert copied_frac(alone) == 0 == context_copies(alone).forward_bytes
