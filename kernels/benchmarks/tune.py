"""Choose the tiles of every kernel on this GPU and write the table that the package reads.

    PYTHONPATH=kernels python kernels/benchmarks/tune.py --out kernels/phsa_kernels/tuning/sm_90.json

Kernels are tuned one after another, each with the others as they are: the stage that holds the kernel is
timed for both head shapes and k = 2 and 16 at 32k tokens, and the candidate with the smallest sum of times,
each over the best of its case, wins. Without --out the times are printed and nothing is written.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
from bench_phsa import HEADS, Case, Setting, drift_for, graph_ms

from phsa_kernels import configs
from phsa_kernels.attend import launch as attend
from phsa_kernels.configs import Launch
from phsa_kernels.select import launch as select

SEQ_LEN = 32768
TOPKS = (2, 16)
# Stage, and the launches to try. The rows of dq are forward's: each dq candidate names its forward as well.
FORWARD = (
    Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2, 168), Launch(128, 32, 8, 3, 128),
    Launch(128, 64, 8, 2, 128),
)  # fmt: skip
DQ = (
    Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(64, 32, 4, 3), Launch(128, 32, 8, 2, 128),
    Launch(128, 32, 8, 3, 128),
)  # fmt: skip
CANDIDATES = {
    "normalizer": ("select", (
        Launch(128, 64, 4, 2), Launch(128, 64, 4, 3), Launch(64, 64, 4, 3), Launch(128, 32, 4, 3),
        Launch(256, 64, 8, 2),
    )),
    "select_columns": ("select", (
        Launch(64, 32, 4, 2), Launch(64, 32, 4, 3), Launch(64, 64, 4, 2), Launch(128, 32, 8, 2),
    )),
    "select_list": ("select", (
        Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 4, 2), Launch(64, 64, 8, 2),
    )),
    "window_dkdv": ("attend_backward", (
        Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 128, 8, 2), Launch(32, 64, 4, 3),
    )),
    "chosen_dkdv": ("attend_backward", (
        Launch(64, 16, 4, 2), Launch(64, 16, 4, 3), Launch(128, 16, 4, 2), Launch(32, 16, 2, 2),
    )),
    "init_chunk_rows": ("attend_backward", (512, 1024, 2048, 4096)),
    "forward": ("attend", FORWARD),
    "dq": ("attend_backward", DQ),
}  # fmt: skip


def use(table):
    select.configs_for = attend.configs_for = lambda device, dtype: table


def changed(table, name, candidate):
    """The table with one candidate; dq brings the forward tile of its rows."""
    if name == "dq" and table.forward.rows != candidate.rows:
        same_rows = [f for f in FORWARD if f.rows == candidate.rows]
        table = dataclasses.replace(table, forward=same_rows[1])
    return dataclasses.replace(table, **{name: candidate})


def calls(case):
    pooled = case.pool()
    ids = case.select(pooled)
    return {
        "select": lambda: case.select(pooled),
        "attend": lambda: case.attend(ids),
        "attend_backward": lambda: case.attend_backward(ids),
    }


def compile_all(heads, topk, part, parts):
    """Run a share of the candidates once on a short case: the cache on disk serves the tuning."""
    run = calls(Case(8192, Setting(heads), topk, 0.9))
    base = configs.configs_for(torch.device("cuda"), torch.bfloat16)
    jobs = [(n, s, c) for n, (s, candidates) in CANDIDATES.items() for c in candidates]
    for name, stage, candidate in jobs[part::parts]:
        use(changed(base, name, candidate))
        try:
            run[stage]()
        except Exception as error:  # a tile too large for the device: tuning meets it again and leaves it out
            print(f"{name} {candidate}: {type(error).__name__}", flush=True)


def compile_in_parallel(parts):
    running = [
        subprocess.Popen([sys.executable, __file__, "--compile", f"{heads[0]},{heads[1]},{k},{part},{parts}"])
        for heads, k, part in itertools.product(HEADS, TOPKS, range(parts))
    ]
    failed = sum(process.wait() != 0 for process in running)
    if failed:  # only time is lost: tuning compiles what is not in the cache
        print(f"{failed} of {len(running)} compilation processes failed", flush=True)


def tune(rep_ms):
    table = configs.configs_for(torch.device("cuda"), torch.bfloat16)
    shares = [(s, k, drift_for(SEQ_LEN, s, k)) for s, k in itertools.product(map(Setting, HEADS), TOPKS)]
    cases = [calls(Case(SEQ_LEN, setting, topk, rho)) for setting, topk, rho in shares]
    log = []
    for name, (stage, candidates) in CANDIDATES.items():
        times = {}
        for candidate in candidates:
            use(changed(table, name, candidate))
            try:
                times[candidate] = [graph_ms(case[stage], rep_ms) for case in cases]
            except Exception as error:  # too much shared memory or too few registers: not a candidate here
                print(f"{name} {candidate}: left out, {type(error).__name__}", flush=True)
        best = [min(column) for column in zip(*times.values(), strict=True)]
        score = {c: sum(t / b for t, b in zip(row, best, strict=True)) for c, row in times.items()}
        for candidate, row in times.items():
            shown = dataclasses.astuple(candidate) if isinstance(candidate, Launch) else candidate
            print(
                f"{name:16} {shown!s:20}",
                *(f"{ms:8.4f}" for ms in row),
                f"{score[candidate]:.3f}",
                flush=True,
            )
            log.append({"kernel": name, "launch": shown, "ms": row})
        table = changed(table, name, min(score, key=score.__getitem__))
    return table, log


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="table to write")
    parser.add_argument("--log", type=Path, help="write all times, JSON")
    parser.add_argument("--rep-ms", type=int, default=20)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        heads_q, heads_kv, *rest = map(int, arguments.compile.split(","))
        compile_all((heads_q, heads_kv), *rest)
        return
    compile_in_parallel(parts=4)
    table, log = tune(arguments.rep_ms)
    print(table)
    if arguments.log:
        arguments.log.write_text(json.dumps(log, indent=1) + "\n")
    if arguments.out:
        configs.write_table(table, arguments.out)


if __name__ == "__main__":
    main()
