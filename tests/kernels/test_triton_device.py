"""What only a GPU can show: more than 2**31 elements, no wait for the device, CUDA graphs, memcheck."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from phsa_kernels import api
from phsa_kernels.testing import (
    Shape,
    attend_and_gradients,
    compare_with_truth,
    random_inputs,
    relative_errors,
)
from phsa_kernels.testing_selection import compare_rows

pytestmark = pytest.mark.gpu
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS = 64


@needs_device
def test_more_than_two_to_the_31_elements():
    """1.1 million tokens, 16/8 heads of 128: forward and gradients of 64 queries (first, last, random)."""
    shape = Shape((1_100_000,), 16, 8, 128, 2, 128, 512)
    assert shape.num_tokens * shape.heads_q * shape.head_dim > 2**31
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(shape.num_tokens, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
        for heads in (16, 8, 8)
    )
    cu_seqlens = shape.cu_seqlens("cuda")
    position, document = api.token_positions(cu_seqlens, shape.num_tokens)
    pooled = api.pool(k, None, cu_seqlens, impl="triton")
    blocks = api.block_boundaries(cu_seqlens, 16)
    ids = api.select(
        q, pooled, position, document, blocks, topk=2, init_tokens=128, local_tokens=512, impl="triton"
    )
    random = torch.randint(0, shape.num_tokens, (ROWS - 32,), generator=torch.Generator().manual_seed(1))
    rows = torch.cat(
        [torch.arange(16), random.sort().values, torch.arange(16) + shape.num_tokens - 16]
    ).cuda()
    for row in rows.split(8):  # fp64 scores of 8 rows against all blocks
        current = position[row].long() // 16
        _, wrong = compare_rows(shape, q[row], pooled, current, ids[row].long())
        assert wrong == 0
    upstream = torch.zeros_like(q)
    upstream[rows] = torch.randn(ROWS, 16, 128, device="cuda", generator=generator).bfloat16()

    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, _ = api.attend(*inputs, ids, position, document, cu_seqlens, **shape.windows(), impl="triton")
    mine = [out.detach()[rows], *torch.autograd.grad(out, inputs, upstream)]
    others = torch.ones(shape.num_tokens, dtype=torch.bool, device="cuda")
    others[rows] = False
    assert not mine[1][others].any(), "a query without an upstream gradient has one"
    mine[1] = mine[1][rows]
    del out, others
    torch.cuda.empty_cache()
    truth = one_by_one(shape, q.detach(), k.detach(), v.detach(), ids, rows, upstream[rows].double())
    # Three units, as in phsa_kernels.testing, and one for eager PyTorch's own rounding of its result.
    budget = 4 * torch.finfo(torch.bfloat16).eps / 2
    for name, got, true in zip(("out", "dq", "dk", "dv"), mine, truth, strict=True):
        error = (
            relative_errors(got.float(), true.float())[0]
            if name in {"out", "dq"}
            else sparse_error(got, true)
        )
        print(name, error)
        assert error <= budget, (name, error)


def one_by_one(shape, q, k, v, ids, rows, upstream):
    """Return out and dq of the rows, and dk and dv, each row's attention written out in fp64."""
    out, dq = torch.zeros_like(upstream), torch.zeros_like(upstream)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device="cuda") for x in (k, v))
    group = shape.heads_q // shape.heads_kv
    for i, row in enumerate(rows.tolist()):
        start = max(0, row // 16 * 16 - shape.local_tokens + 16)
        windows = torch.cat(
            [torch.arange(min(shape.init_tokens, start)), torch.arange(start, row + 1)]
        ).cuda()
        for head in range(shape.heads_kv):
            chosen = ids[row, head][ids[row, head] >= 0].long()[:, None] * 16 + torch.arange(
                16, device="cuda"
            )
            keys = torch.cat([windows, chosen.flatten()])
            heads = slice(head * group, (head + 1) * group)
            mine = [q[row, heads], k[keys, head], v[keys, head]]
            qi, ki, vi = (x.detach().double().requires_grad_() for x in mine)
            o = (qi @ ki.T / shape.head_dim**0.5).softmax(-1) @ vi
            grads = torch.autograd.grad(o, [qi, ki, vi], upstream[i, heads])
            out[i, heads], dq[i, heads] = o.detach(), grads[0]
            dk[:, head].index_add_(0, keys, grads[1].float())
            dv[:, head].index_add_(0, keys, grads[2].float())
    return out, dq, dk, dv


def sparse_error(got, true):
    """Relative L2 error; rows that nobody attends to must be exactly zero."""
    touched = true.flatten(1).any(1)
    assert not got[~touched].any()
    return relative_errors(got[touched].float(), true[touched])[0]


def small_case():
    shape = Shape((300, 77, 500), 4, 2, 64, 2, 64, 128)
    *qkv, weights, grad_out, _ = random_inputs(shape, torch.bfloat16, "cuda", seed=0)
    return shape, qkv, weights, grad_out


def step(shape, qkv, weights, grad_out):
    out = api.phsa_attention(
        *qkv, weights, shape.cu_seqlens("cpu").cuda(), topk=shape.topk, **shape.windows(), impl="triton"
    ).out
    return [out, *torch.autograd.grad(out, qkv, grad_out)]


@needs_device
def test_a_captured_graph_gives_the_same_bits_for_new_inputs():
    shape, qkv, weights, grad_out = small_case()
    cu_seqlens = shape.cu_seqlens("cuda")

    def run():
        out = api.phsa_attention(
            *qkv, weights, cu_seqlens, topk=shape.topk, **shape.windows(), impl="triton"
        ).out
        return [out, *torch.autograd.grad(out, qkv, grad_out)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host synchronization in here is an error
        captured = run()
    with torch.no_grad():
        for x in qkv:
            x.copy_(x.flip(0))
    graph.replay()
    for mine, again in zip(captured, run(), strict=True):
        assert torch.equal(mine, again)


@needs_device
def test_nothing_waits_for_the_device():
    shape, qkv, weights, grad_out = small_case()
    cu_seqlens = shape.cu_seqlens("cuda")
    step(shape, qkv, weights, grad_out)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = api.phsa_attention(
            *qkv, weights, cu_seqlens, topk=shape.topk, **shape.windows(), impl="triton"
        ).out
        torch.autograd.grad(out, qkv, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_device
def test_the_budget_of_long_fp32_sums_notices_shorter_operands():
    """Negative control: with q, k and v in ten bits, as TF32 products take them, no result is within it."""
    shape = Shape((2500,), 16, 1, 128, 2, 16, 128)
    *qkv, weights, grad_out, grad_lse = random_inputs(shape, torch.float32, "cuda", seed=3)
    ids = api.phsa_attention(
        *qkv, weights, shape.cu_seqlens("cuda"), topk=shape.topk, **shape.windows(), impl="triton"
    ).ids
    short = [
        (x.detach().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32).requires_grad_() for x in qkv
    ]
    kernel = attend_and_gradients("triton", shape, short, ids, grad_out, grad_lse)
    assert not any(c.within for c in compare_with_truth(shape, qkv, ids, grad_out, grad_lse, kernel))


@needs_device
def test_memcheck_finds_nothing():
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer is not None, "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit"
    package = str(Path(api.__file__).parents[1])
    code = "import test_triton_device as t; t.step(*t.small_case()); import torch; torch.cuda.synchronize()"
    done = subprocess.run(
        [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code],
        cwd=Path(__file__).parent, env=os.environ | {"PYTHONPATH": package}, capture_output=True,
        text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
