"""One token's attention over a cache against dense decoding on one GPU: gate first, then rows of `h100.json`.

    PYTHONPATH=kernels python kernels/benchmarks/bench_decode.py --commit "$(git rev-parse HEAD)"

Ours is selection and attention; the rows `with_append` add the writing of the new key and of its block,
which dense decoding is not charged for. Dense decoding is the fastest of torch's attention kernels, each with
two ways to give it grouped heads and two layouts of the cache, and of our own kernel without selection. All
are timed as CUDA graphs in one run (`bench_phsa.graph_ms`: L2 flushed, medians). `--tiles` times other tiles.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import triton
from bench_phsa import graph_ms
from report import write_report
from roofline import BYTES_PER_S
from torch.nn.attention import SDPBackend, sdpa_kernel

from phsa_kernels import api
from phsa_kernels.decode import launch, tiles
from phsa_kernels.testing import relative_errors

HEADS = ((16, 8), (32, 8))
TOPKS = (2, 16)
LENGTHS = (131072, 8192, 32768, 65536)  # the gates' length first
BATCHES = (1, 4, 16)
HEAD_DIM, BLOCK, INIT, LOCAL = 128, 16, 128, 512
WINDOWS = {"init_tokens": INIT, "local_tokens": LOCAL, "block_tokens": BLOCK}
GATES = {1: 5.0, 16: 12.0}  # times as fast as dense at 128k, 16/8 heads, k = 2, by batch
REP_MS = 20
TILE_CHOICES = {
    "score_blocks": (32, 128), "programs_per_multiprocessor": (2, 8), "num_stages": (2, 4),
    "attend_keys": (32, 128), "max_steps": (8, 32), "attend_warps": (8,), "score_warps": (2, 8),
    "chunk_blocks": (512, 2048),
}  # fmt: skip


class Step:
    """Caches of B sequences of equal length and one new token of each."""

    def __init__(self, batch, length, capacity=None, heads_kv=8, seed=0):
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*sizes):
            return torch.randn(sizes, device="cuda", dtype=torch.bfloat16, generator=generator)

        capacity = capacity or length
        self.batch, self.length = batch, length
        # Heads outermost: a block's keys lie together.
        self.k, self.v = (normal(batch, heads_kv, capacity, HEAD_DIM).transpose(1, 2) for _ in range(2))
        self.pooled = normal(batch, heads_kv, capacity // BLOCK, HEAD_DIM).transpose(1, 2) / 4
        self.new = normal(batch, heads_kv, HEAD_DIM)
        self.marks = torch.ones(batch, device="cuda", dtype=torch.bool)
        self.sums = torch.zeros(batch, heads_kv, 2, HEAD_DIM, device="cuda")
        self.count = torch.zeros(batch, heads_kv, device="cuda", dtype=torch.int32)
        self.lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
        self.queries = {heads: normal(batch, heads, HEAD_DIM) for heads, _ in HEADS}

    def attention(self, heads_q, topk, impl="triton", dense_len=0):
        return api.decode_attention(
            self.queries[heads_q], self.k, self.v, self.pooled, self.lengths, topk=topk, **WINDOWS,
            dense_len_tokens=dense_len, impl=impl,
        )  # fmt: skip

    def append(self):
        api.append_keys(
            self.new, self.new, self.marks, self.lengths, self.k, self.v, self.pooled, self.sums, self.count,
            impl="triton",
        )  # fmt: skip

    def with_append(self, heads_q, topk):
        self.append()
        return self.attention(heads_q, topk)

    def choose(self, heads_q, topk):
        method = launch.Method(topk, INIT, LOCAL, BLOCK, 0, True, HEAD_DIM**-0.5)
        return launch.choose(self.queries[heads_q], self.pooled, self.lengths, method)


def gate():
    """Refuse to time kernels that are not right: outputs within rounding of fp64, twice the same."""
    for seed, (heads, topk, lengths) in enumerate(
        ((16, 2, (4096, 3333, 17)), (32, 16, (4096, 640, 2001)), (16, 2, (131072, 131071)))
    ):
        step = Step(len(lengths), max(lengths), seed=seed)
        step.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        got, again = step.attention(heads, topk), step.attention(heads, topk)
        if not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
            sys.exit(f"gate: two runs differ at lengths {lengths}")
        exact = Step.__new__(Step)
        exact.__dict__.update(step.__dict__)
        for name in ("k", "v", "pooled"):
            setattr(exact, name, getattr(step, name).double())
        exact.queries = {heads: step.queries[heads].double()}
        truth = exact.attention(heads, topk, impl="reference")
        same = (truth.ids == got.ids).flatten(1).all(1)  # scores closer than fp32 errors may swap blocks
        error = relative_errors(got.out[same], truth.out[same])[0]
        print(f"gate lengths {lengths}: equal ids {same.tolist()}, error {error:.2e}")
        # Eager bf16 rounds the result; the kernel also its probabilities: three units as elsewhere.
        if not same.any() or error > 3 * torch.finfo(torch.bfloat16).eps / 2:
            sys.exit(f"gate: outputs are wrong at lengths {lengths}")
        del exact, truth


def dense_calls(step, heads_q, tokens_outer):
    """Name -> call of every way to attend to all tokens: torch's, and our own kernel without selection."""
    batch, heads_kv = step.batch, step.new.shape[1]
    q = step.queries[heads_q]
    one_row = q.unsqueeze(2)  # [B, Hq, 1, D]
    packed = q.view(batch, heads_kv, heads_q // heads_kv, HEAD_DIM)  # heads of a group as rows of one
    layouts = {"heads_outer": (step.k.transpose(1, 2), step.v.transpose(1, 2))}
    layouts["tokens_outer"] = tuple(x.transpose(1, 2) for x in tokens_outer)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    calls = {"ours_dense": lambda: step.attention(heads_q, 0, dense_len=step.length).out}
    for (backend, kind), (layout, (k, v)), (name, rows) in itertools.product(
        backends.items(), layouts.items(), (("gqa", one_row), ("packed", packed))
    ):

        def call(kind=kind, k=k, v=v, rows=rows, grouped=name == "gqa"):
            with sdpa_kernel(kind):
                return torch.nn.functional.scaled_dot_product_attention(rows, k, v, enable_gqa=grouped)

        calls[f"{backend}_{name}_{layout}"] = call
    return calls


def dense_ms(step, heads_q, tokens_outer):
    """Milliseconds of every dense variant that runs, each checked against ours; the reason of the others."""
    wanted = step.attention(heads_q, 0, dense_len=step.length).out.float()
    times, refused = {}, {}
    for name, call in dense_calls(step, heads_q, tokens_outer).items():
        try:
            out = call()
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0][:80]
            continue
        difference = (out.float().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        if difference > 0.02:
            sys.exit(f"dense {name} differs from our dense attention by {difference:.3f}")
        times[name] = round(graph_ms(call, REP_MS), 4)
    return times, refused


def roofline_ms(stage, batch, length, topk):
    """Milliseconds to read the pooled keys, and but for selection the attended keys and values, once."""
    rows = length // BLOCK + (0 if stage == "select" else 2 * (INIT + LOCAL + topk * BLOCK))
    return 1e3 * batch * 8 * HEAD_DIM * 2 * rows / BYTES_PER_S


def rows_of(step, heads, topk, times, common):
    heads_q, heads_kv = heads
    best = min(times, key=times.get)
    calls = {
        "attention": lambda: step.attention(heads_q, topk),
        "with_append": lambda: step.with_append(heads_q, topk),
        "select": lambda: step.choose(heads_q, topk),
    }
    for stage, call in calls.items():
        ms = graph_ms(call, REP_MS)
        floor = roofline_ms(stage, step.batch, step.length, topk)
        yield {
            "heads_q": heads_q, "heads_kv": heads_kv, "head_dim": HEAD_DIM, "seq_len_tokens": step.length,
            "batch": step.batch, "block": BLOCK, "topk": topk, "init_tokens": INIT, "local_tokens": LOCAL,
            "group_score": "softmax_sum", "overlap": "one query", "pass": "decode", "stage": stage,
            "ours_ms": round(ms, 4), "roofline_ms": round(floor, 4),
            "dense_ms": times[best], "dense": best, "dense_variants_ms": times,
            "ratio": None if stage == "select" else round(times[best] / ms, 3),
        } | common  # fmt: skip


def measure(arguments):
    common = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": arguments.commit,
    }  # fmt: skip
    started, rows, told = time.monotonic(), [], set()
    for length, batch in itertools.product(arguments.lengths, arguments.batches):
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped before {length} x {batch}: --seconds {arguments.seconds} is over", flush=True)
            break
        step = Step(batch, length)
        tokens_outer = step.k.contiguous(), step.v.contiguous()
        for heads in HEADS:
            times, refused = dense_ms(step, heads[0], tokens_outer)
            for name, reason in refused.items():
                if name not in told:
                    print(f"not served: {name}: {reason}")
                    told.add(name)
            for topk in TOPKS:
                for row in rows_of(step, heads, topk, times, common):
                    rows.append(row)
                    keys = ("heads_q", "seq_len_tokens", "batch", "topk", "stage", "ours_ms", "roofline_ms")
                    print(
                        *(row[key] for key in keys), row["dense_ms"], row["dense"], row["ratio"], flush=True
                    )
        del step, tokens_outer
    return rows


def show_gates(rows):
    for row in rows:
        wanted = GATES.get(row["batch"]) if row["seq_len_tokens"] == 131072 else None
        if wanted and row["heads_q"] == 16 and row["topk"] == 2 and row["stage"] != "select":
            met = "met" if row["ratio"] >= wanted else "MISSED"
            print(f"gate batch {row['batch']} {row['stage']}: {row['ratio']} of {wanted}: {met}")


def try_tiles():
    """Print the times of other tile sizes, one changed at a time, at the gates' shapes."""
    for batch in (1, 16):
        step = Step(batch, 131072)
        for name, value in [("as they are", None), *((n, v) for n, vs in TILE_CHOICES.items() for v in vs)]:
            usual = tiles.TILES
            if value is not None:
                tiles.TILES = dataclasses.replace(usual, **{name: value})
            try:
                select = graph_ms(partial(step.choose, 16, 2), REP_MS)
                whole = graph_ms(partial(step.attention, 16, 2), REP_MS)
            finally:
                tiles.TILES = usual
            print(
                f"tiles batch {batch} {name} {value}: select {select:.4f} attention {whole:.4f}", flush=True
            )


def warm_compilation():
    """Compile every (heads, k) in its own process: the cache on disk serves this one afterwards."""
    jobs = [(heads, topk) for heads, _ in HEADS for topk in TOPKS]
    running = [
        subprocess.Popen([sys.executable, __file__, "--compile", json.dumps([length, batch, *job])])
        for job in jobs
        for length, batch in ((131072, 1), (8192, 16))
    ]
    for process in running:
        if process.wait():
            sys.exit("a kernel does not compile")


def write_rows(rows, folder):
    """Put the rows in the place of the decode rows of the results, and write table and plot anew."""
    path = folder / "h100.json"
    others = [row for row in json.loads(path.read_text()) if row["pass"] != "decode"] if path.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(others + rows, indent=1) + "\n")
    write_report(others + rows, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--seconds", type=int, default=10**9, help="begin no new case after this many")
    parser.add_argument("--tiles", action="store_true", help="only time other tile sizes; write nothing")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        length, batch, heads_q, topk = json.loads(arguments.compile)
        step = Step(batch, length)
        step.with_append(heads_q, topk)
        step.attention(heads_q, 0, dense_len=length)
        torch.cuda.synchronize()
        return
    warm_compilation()
    gate()
    if arguments.tiles:
        try_tiles()
        return
    rows = measure(arguments)
    show_gates(rows)
    write_rows(rows, arguments.out)


if __name__ == "__main__":
    main()
