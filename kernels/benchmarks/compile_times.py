"""Seconds that each kernel of a forward and backward pass takes to compile for an H100; needs no GPU.

    python kernels/benchmarks/compile_times.py --dtype float32
    python kernels/benchmarks/compile_times.py --dtype float32 --tiles table   # bf16's tiles: minutes

The launches run as they are, with a driver in the GPU's place that says what it is; nothing is computed. Use
an empty TRITON_CACHE_DIR, or what is compiled already takes no time.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from phsa_kernels import configs
from phsa_kernels.attend import launch as attend
from phsa_kernels.select import launch as select
from phsa_kernels.testing import Shape

CAPABILITY = (9, 0)
SHAPES = {
    "16/8, k = 2": Shape((256,), 16, 8, 128, 2, 16, 128),
    "16/8, k = 16": Shape((256,), 16, 8, 128, 16, 16, 128),
    "16/1, k = 2": Shape((256,), 16, 1, 128, 2, 16, 128),
    "12/4, k = 1": Shape((256,), 12, 4, 128, 1, 128, 512),
    "32/2, k = 16, blocks of 64": Shape((256,), 32, 2, 128, 16, 64, 512, block_tokens=64),
}


class NoGpu:
    """Says what it is, as Triton's driver of a device does."""

    def get_current_target(self) -> GPUTarget:
        """Return the architecture."""
        return GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        """Return its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return no stream."""
        return 0


def time_compilations() -> None:
    """Replace the launch of kernels by their compilation, and print what each takes."""
    compile_only, seen = jit.JITFunction.run, set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        start_s = time.perf_counter()
        compiled = compile_only(kernel, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            code = hashlib.sha256(compiled.asm["ptx"].encode()).hexdigest()[:8]
            print(
                f"  {kernel.__name__:24} {time.perf_counter() - start_s:7.1f} s, "
                f"{compiled.metadata.shared:6} bytes shared, PTX {code}",
                flush=True,
            )
        return compiled

    driver.set_active(NoGpu())
    jit.JITFunction.run = run


def launch_all(shape: Shape, dtype: torch.dtype) -> None:
    """Launch what forward and backward of one shape need."""
    num_tokens, block = shape.num_tokens, shape.block_tokens
    q = torch.zeros(num_tokens, shape.heads_q, shape.head_dim, dtype=dtype)
    k = torch.zeros(num_tokens, shape.heads_kv, shape.head_dim, dtype=dtype)
    positions = torch.arange(num_tokens, dtype=torch.int32)
    document, bounds = torch.zeros_like(positions), torch.tensor([0, num_tokens], dtype=torch.int32)
    pooled = torch.zeros(num_tokens // block, shape.heads_kv, 1, shape.head_dim, dtype=dtype)
    where, windows = (positions, document), (shape.init_tokens, shape.local_tokens, block)
    ids = select.select_blocks(q, pooled, *where, bounds // block, shape.topk, *windows, True, 0.1).fill_(-1)
    out, lse, rows, union = attend.attend_forward(q, k, k, ids, *where, bounds, *windows, 0, 0.1, None)
    saved = (out, lse, rows.zero_(), union.zero_())  # nothing has filled them
    gradients = torch.zeros_like(q), torch.zeros_like(lse)
    attend.attend_backward(*gradients, q, k, k, ids, *saved, bounds, shape.init_tokens, block, 0.1, None)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument(
        "--tiles", choices=["own", "table"], default="own", help="table: the tuned ones for any dtype"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    tuned = configs.read_table(configs.table_path(CAPABILITY))
    chosen = configs.FULL_PRECISION if dtype == torch.float32 and arguments.tiles == "own" else tuned
    attend.configs_for = select.configs_for = lambda device, dtype: chosen
    time_compilations()
    for name in arguments.shapes:
        print(f"{name}, {arguments.dtype}", flush=True)
        start_s = time.perf_counter()
        launch_all(SHAPES[name], dtype)
        print(f"  all                      {time.perf_counter() - start_s:7.1f} s", flush=True)


if __name__ == "__main__":
    main()
