"""One process after the other, with what the others send (kernels/benchmarks), equals one process."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
WINDOWS = {"block_tokens": 4, "init_tokens": 4, "local_tokens": 8}
BOUNDS = [0, 3, 97, 131, 192]


@pytest.fixture(scope="module")
def emulation():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("emulation", BENCHMARKS / "emulate_context_parallel.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(192, heads, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2)]


@pytest.mark.parametrize(
    "way",
    [
        ("all_gather", "zigzag"),
        ("all_gather", "contiguous"),
        ("block_sparse", "zigzag"),
        ("block_sparse", "contiguous"),
    ],
)
def test_replayed_processes_equal_one(emulation, qkv, way):
    unit = torch.finfo(torch.float64).eps
    found = emulation.gate(qkv, BOUNDS, 2, way, 4, unit, **WINDOWS)
    assert set(found) == {"ids", "out", "dq", "dk", "dv"}
    assert all(distance <= bound for distance, bound in found.values()), found
    lost = emulation.control(qkv, BOUNDS, 2, way, 4, **WINDOWS)
    assert lost > 1e-3, "the loss of one process's pooled keys is not seen"


def test_a_played_pass_gives_the_recorded_output_and_own_shapes(emulation, qkv):
    for way in (("all_gather", "zigzag"), ("all_gather", "contiguous"), ("block_sparse", "zigzag")):
        replay = emulation.Replay(4)
        layer = emulation.Layer(qkv, BOUNDS, 2, way, replay, **WINDOWS)
        recorded = replay.record(lambda layer=layer: layer.forward(layer.inputs()).detach())
        with replay.playing(2) as start:
            for _ in range(2):
                start()
                inputs = layer.inputs()
                out = layer.forward(inputs)
                grads = torch.autograd.grad(out.sum(), inputs)
                assert torch.equal(out, recorded[2])
                assert all(grad.shape == x.shape for grad, x in zip(grads, inputs, strict=True))


def test_bytes_are_those_of_the_formula(emulation, qkv):
    replay = emulation.Replay(4)
    layer = emulation.Layer(qkv, BOUNDS, 2, ("all_gather", "zigzag"), replay, **WINDOWS)
    upstream = torch.ones_like(qkv[0])
    replay.record(lambda: layer.results(upstream)[0])
    key = 2 * 8 * 8  # bytes of a token's keys
    forward = 2 * 3 * key * 3 + 48 // 4 * key * 3 + 2 * 48 * key * 3
    assert replay.sent_bytes == [forward + 2 * 48 * key * 3] * 4
