"""What one of 8 context-parallel GPUs computes in a layer's attention, timed on one GPU.

    PYTHONPATH=.:kernels python kernels/benchmarks/emulate_context_parallel.py --commit COMMIT

A process's own queries against all keys, through `PHSACoreAttention` itself: pooling of own keys, selection
with the queries' positions, the exchange's own work (order of the gathered keys, marks and slots of needed
blocks), attention and the backward pass. What the other processes send comes from `context_replay.py`, so
that sending takes no time here, and what is gathered lies where the collective puts it. Gate first: output,
selected blocks and gradients of 8 processes equal those of one within rounding, at a smaller size. Beside
each row stands what `phsa-train plan` says, and the step that the plan comes to with the measured attention
in the place of its own.

Times are medians of CUDA events (`eager_ms`: with Python and launches) and the sum of the kernels' own times
by the profiler (`device_ms`: what the plan's rows are).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from phsa_megatron.parallel import cpu_shim

cpu_shim.install()

import torch  # noqa: E402
from context_projection import RECIPES, projection  # noqa: E402
from context_replay import Replay  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from phsa_megatron.attention.core_attention import PHSACoreAttention  # noqa: E402
from phsa_megatron.attention.punctuation import PunctuationTable  # noqa: E402
from phsa_megatron.attention.side_info import SideInfo  # noqa: E402
from phsa_megatron.config import schema  # noqa: E402
from phsa_megatron.config.planning.attention_time import AttentionTime  # noqa: E402
from phsa_megatron.parallel.sequence_sharding import own_positions  # noqa: E402

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SIZE, HEAD_DIM = 8, 128
WAYS = (("all_gather", "zigzag"), ("block_sparse", "zigzag"), ("all_gather", "contiguous"))
TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(128)],
    schema.PunctuationMatch.exact,
    schema.PunctuationLanguage.en,
)
UNIT = 2.0**-8  # of bf16: half the distance of neighbours


class Layer:
    """Queries, keys and values of one row, and the attention of one process or of one among `size`."""

    def __init__(self, qkv, bounds, topk, way, replay=None, **windows):
        exchange, sharding = way
        self.whole, self.replay, self.sharding = qkv, replay, schema.ContextSharding(sharding)
        device = qkv[0].device
        impl = schema.KernelImpl.triton if device.type == "cuda" else schema.KernelImpl.reference
        settings = schema.AttentionConfig(impl=impl, **windows)
        tokens = torch.randint(0, 128, (1, len(qkv[0])), generator=torch.Generator().manual_seed(0))
        self.kept = SimpleNamespace(record=self._record)
        # What depends on the process is remembered in the side information: one for each process.
        self.infos = [
            SideInfo.build(
                tokens.to(device),
                torch.tensor(bounds, dtype=torch.int32, device=device),
                TABLE.to(device),
                settings,
                topk,
            )
            for _ in range(replay.size if replay else 1)
        ]
        parallel = schema.ParallelConfig(
            context_exchange=schema.ContextExchange(exchange), context_sharding=self.sharding
        )
        config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=len(self.infos))
        self.attention = PHSACoreAttention(
            config, 1, AttnMaskType.causal, "self", attention=settings, parallel=parallel,
            pg_collection=replay.collection() if replay else None,
        )  # fmt: skip

    def _record(self, layer, query, key, value, ids, *rest):
        self.ids = ids

    def own(self):
        """int64 positions of the process's tokens."""
        rank = self.replay.rank if self.replay else 0
        size = self.replay.size if self.replay else 1
        return own_positions(len(self.whole[0]), size, rank, self.sharding, self.whole[0].device)

    def inputs(self):
        """The process's [S / size, 1, H, D], with gradients of their own."""
        own = self.own()
        return [x.detach()[own].unsqueeze(1).requires_grad_() for x in self.whole]

    def forward(self, inputs, keep=False):
        """[S / size, 1, Hq * D]; `keep` remembers the selected blocks in `ids`."""
        info = self.infos[self.replay.rank if self.replay else 0]
        info.recorder = self.kept if keep else None
        return self.attention(*inputs, None, packed_seq_params=info)

    def results(self, upstream):
        """Output, selected blocks and gradients of the process's tokens."""
        inputs = self.inputs()
        out = self.forward(inputs, keep=True)
        grads = torch.autograd.grad(out, inputs, upstream[self.own()].view(out.shape))
        return out.detach(), self.ids, *(grad.detach() for grad in grads)


def relative(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def gate(qkv, bounds, topk, way, size, unit, **windows):
    """Return {name: (distance of `size` processes from one, bound)} for one row of packed documents.

    The selected blocks must be the same. Each other result is rounded to its dtype in both, and a sum of
    probabilities times values is rounded on the way: three units. Gradients of keys and values are sums of
    one rounded part of each process: one unit more for the sum, and one of each part, which add up to the
    root of their number.
    """
    replay = Replay(size)
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1)).to(qkv[0])
    one = Layer(qkv, bounds, topk, way, **windows).results(upstream)
    layer = Layer(qkv, bounds, topk, way, replay, **windows)
    ranks = replay.record(lambda: (layer.own(), *layer.results(upstream)))
    own, *many = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    order = own.argsort()
    distances = {"ids": (float((many[1][order] != one[1]).any(-1).any(-1).float().mean()), 0.0)}
    sums = 4 + size**0.5
    for place, name, units in ((0, "out", 3), (2, "dq", 3), (3, "dk", sums), (4, "dv", sums)):
        distances[name] = relative(many[place][order], one[place]), units * unit
    return distances


def control(qkv, bounds, topk, way, size, **windows):
    """Return how far the output moves if one process's pooled keys are lost: what the gate would see."""
    from phsa_megatron.attention.context_parallel import ContextShard

    whole = ContextShard.gather_pooled

    def incomplete(shard, *arguments):
        pooled = whole(shard, *arguments).clone()
        pooled[len(pooled) // size : 2 * len(pooled) // size] = 0.0
        return pooled

    replay = Replay(size)
    with torch.no_grad():
        inputs = Layer(qkv, bounds, topk, way, **windows)
        one = inputs.forward(inputs.inputs())
        layer = Layer(qkv, bounds, topk, way, replay, **windows)
        with mock.patch.object(ContextShard, "gather_pooled", incomplete):
            ranks = replay.record(lambda: (layer.own(), layer.forward(layer.inputs())))
    order = torch.cat([own for own, _ in ranks]).argsort()
    return relative(torch.cat([out for _, out in ranks])[order], one)


PAPER = {"block_tokens": 16, "init_tokens": 128, "local_tokens": 512}


def run_gate(report):
    """Compare 8 processes with one, and with one that has lost what another pooled."""
    from bench_phsa import make_inputs

    bounds = [0, 5000, 5003, 12001, 16384]
    for heads in RECIPES:
        qkv = [x.detach() for x in make_inputs(16384, heads, 0.99)]
        for topk, way in ((2, WAYS[0]), (16, WAYS[0]), (2, WAYS[1]), (16, WAYS[1]), (2, WAYS[2])):
            found = gate(qkv, bounds, topk, way, SIZE, UNIT, **PAPER)
            lost = control(qkv, bounds, topk, way, SIZE, **PAPER)
            row = {name: {"distance": d, "bound": b} for name, (d, b) in found.items()}
            report["gate"].append({"heads": heads, "topk": topk, "way": way, "control_out": lost} | row)
            print("gate", heads, topk, *way, {k: f"{d:.1e}<{b:.1e}" for k, (d, b) in found.items()},
                  f"control {lost:.1e}", flush=True)  # fmt: skip
            if any(not distance <= bound for distance, bound in found.values()):
                report["gate_failures"].append(f"{heads} k={topk} {way}: {found}")
            if lost <= found["out"][1]:
                report["gate_failures"].append(f"{heads} k={topk} {way}: the control passes with {lost}")


def median_ms(call, reps):
    """Median milliseconds between CUDA events."""
    for _ in range(2):
        call()
    pairs = []
    for _ in range(reps):
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        call()
        pair[1].record()
        pairs.append(pair)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def kernels_ms(call, reps=3):
    """{kernel: milliseconds of a call} on the device; one stream, so that they add up."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(reps):
            call()
        torch.cuda.synchronize()
    times = Counter()  # names that differ past the cut add up: none may hide another
    for event in seen.key_averages():
        times[event.key[:60]] += event.self_device_time_total / 1e3 / reps
    return {name: ms for name, ms in times.items() if ms > 0}


def timed(layer, start, reps):
    """Times of one process's forward pass, and of both passes."""
    start()
    inputs = layer.inputs()
    start()
    grad = torch.randn_like(layer.forward(inputs))

    def forward():
        start()
        with torch.no_grad():
            layer.forward(inputs)

    def both():
        start()
        torch.autograd.grad(layer.forward(inputs), inputs, grad)

    row = {}
    for name, call in (("fwd", forward), ("fwd_bwd", both)):
        row[f"{name}_eager_ms"] = median_ms(call, reps)
        kernels = kernels_ms(call)
        row[f"{name}_device_ms"] = sum(kernels.values())
        if name == "fwd":
            row["select_device_ms"] = sum(ms for kernel, ms in kernels.items() if is_selection(kernel))
            assert row["select_device_ms"], f"no selection among {list(kernels)}"
        most = sorted(kernels.items(), key=lambda item: -item[1])[:10]
        row[f"{name}_kernels_ms"] = {kernel: round(ms, 4) for kernel, ms in most}
    return row


def is_selection(kernel):
    """Whether a kernel is of phsa_kernels/select: what hides the gather of keys and values."""
    return kernel.startswith(("normalizer_kernel", "select_columns_kernel", "select_list_kernel"))


def drift_of(heads, topk, seq_len):
    """The drift of the benchmark's row of the nearest length: queries share blocks as measured."""
    rows = json.loads((Path(__file__).parent / "results" / "h100.json").read_text())
    fits = [
        row for row in rows
        if (row["heads_q"], row["heads_kv"], row["topk"], row["block"]) == (*heads, topk, 16)
        and row["overlap"] == "measured" and row["group_score"] == "softmax_sum"
    ]  # fmt: skip
    return min(fits, key=lambda row: abs(row["seq_len_tokens"] - seq_len))["drift"]


def cases(report, heads, topk, seq_len, reps, save):
    from bench_phsa import make_inputs

    qkv = [x.detach() for x in make_inputs(seq_len, heads, drift_of(heads, topk, seq_len))]
    common = {"heads_q": heads[0], "heads_kv": heads[1], "topk": topk, "seq_len_tokens": seq_len}
    bounds = [0, seq_len]
    alone = timed(Layer(qkv, bounds, topk, WAYS[0], **PAPER), lambda: None, max(3, reps // 2))
    for way in WAYS:
        replay = Replay(SIZE)
        layer = Layer(qkv, bounds, topk, way, replay, **PAPER)
        with torch.no_grad():
            replay.record(lambda layer=layer: layer.forward(layer.inputs()) is None)
        rows = []
        for rank in (0, SIZE // 2 - 1, SIZE - 1):
            with replay.playing(rank) as start:
                rows.append({"rank": rank, "sent_mib": replay.sent_bytes[rank] / 2**20})
                rows[-1] |= timed(layer, start, reps)
        slowest = max(rows, key=lambda row: row["fwd_bwd_device_ms"])
        forward = slowest["fwd_device_ms"]
        measured = AttentionTime(
            forward, slowest["fwd_bwd_device_ms"] - forward, slowest["select_device_ms"], ()
        )
        case = common | {"exchange": way[0], "sharding": way[1], "context_size": SIZE, "ranks": rows}
        case["one_gpu"] = alone
        case["efficiency_frac"] = alone["fwd_bwd_device_ms"] / SIZE / slowest["fwd_bwd_device_ms"]
        case |= projection(heads, topk, seq_len, SIZE, measured, *way)
        report["cases"].append(case)
        show(case)
        save()
        del layer, replay
        torch.cuda.empty_cache()


def show(case):
    shape = f"{case['heads_q']}/{case['heads_kv']} k={case['topk']} S={case['seq_len_tokens']}"
    print(shape, case["exchange"], case["sharding"], f"efficiency {case['efficiency_frac']:.2f}")
    for row in case["ranks"]:
        print(f"   rank {row['rank']}: fwd {row['fwd_device_ms']:.3f} ms (eager {row['fwd_eager_ms']:.3f}), "
              f"fwd+bwd {row['fwd_bwd_device_ms']:.3f} (eager {row['fwd_bwd_eager_ms']:.3f}), "
              f"sends {row['sent_mib']:.0f} MiB forward")  # fmt: skip
    one = case["one_gpu"]
    print(f"   one GPU: fwd {one['fwd_device_ms']:.3f} ms, fwd+bwd {one['fwd_bwd_device_ms']:.3f}")
    if "plan_fwd_ms" in case:
        print(f"   plan: fwd {case['plan_fwd_ms']:.3f} ms, fwd+bwd {case['plan_fwd_bwd_ms']:.3f}")
        print(f"   step by the plan {case['plan_step_s']:.3f} s, with the measured attention "
              f"{case['projected_step_s']:.3f} s")  # fmt: skip
    sys.stdout.flush()


def warm_compilation():
    """Compile in processes of their own: the cache on disk serves this one afterwards."""
    jobs = [(heads, topk, way) for heads in RECIPES for topk in (2, 16) for way in WAYS[:2]]
    running = [subprocess.Popen([sys.executable, __file__, "--compile", json.dumps(job)]) for job in jobs]
    if any([process.wait() for process in running]):
        sys.exit("a kernel does not compile")


def compile_one(heads, topk, way):
    from bench_phsa import make_inputs

    heads, replay = tuple(heads), Replay(2)
    qkv = [x.detach() for x in make_inputs(8192, heads, 0.9)]
    for layer in (
        Layer(qkv, [0, 8192], topk, way, **PAPER),
        Layer(qkv, [0, 8192], topk, way, replay, **PAPER),
    ):
        upstream = torch.randn_like(qkv[0])
        if layer.replay:
            replay.record(lambda layer=layer, upstream=upstream: layer.results(upstream))
        else:
            layer.results(upstream)
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "context_parallel_h100.json")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072, 524288])
    parser.add_argument("--seconds", type=int, default=10**9, help="begin no new case after this many")
    parser.add_argument("--keep-going", action="store_true", help="time even if the gate is not passed")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_one(*json.loads(arguments.compile))
        return
    started = time.monotonic()
    import triton

    report = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "commit": arguments.commit, "gate": [], "gate_failures": [], "cases": [], "left_out": [],
    }  # fmt: skip

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    torch.use_deterministic_algorithms(True, warn_only=True)  # as training does
    torch.utils.deterministic.fill_uninitialized_memory = False
    warm_compilation()
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    run_gate(report)
    save()
    if report["gate_failures"] and not arguments.keep_going:
        sys.exit("\n".join(["the gate is not passed:", *report["gate_failures"]]))
    for seq_len in arguments.lengths:
        for heads in RECIPES:
            for topk in (2, 16):
                if time.monotonic() - started > arguments.seconds:
                    report["left_out"].append([*heads, topk, seq_len])
                    save()
                    continue
                cases(report, heads, topk, seq_len, 10 if seq_len <= 131072 else 5, save)
    if report["gate_failures"]:
        sys.exit("\n".join(["the gate is not passed:", *report["gate_failures"]]))
    print(f"done after {time.monotonic() - started:.0f} s, left out {report['left_out']}", flush=True)


if __name__ == "__main__":
    main()
