"""What monitoring at its default settings takes of a step, measured inside of a run.

    python tests/e2e/monitoring_overhead.py --steps 60 --output docs/results [KEY=VALUE ...]

The demo model trains with the default recipe of monitoring (W&B offline, alerts, norms by block, console).
Every call of the loop that only watches is timed: what it takes, waits included, is the overhead. The first
steps warm up. Two runs with and without monitoring would have to be compared to better than 1%, which a
shared machine does not allow. W&B's own process is not in the count: it runs beside the step.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from phsa_megatron.parallel import collective_trace, cpu_shim

collective_trace.install()  # as in a run: each collective is timed
cpu_shim.install()

from phsa_megatron.config.compose import compose  # noqa: E402
from phsa_megatron.config.prepare_run import prepare_run_folder  # noqa: E402
from phsa_megatron.config.run_folder import RunFolder  # noqa: E402
from phsa_megatron.config.schema import TrainConfig  # noqa: E402
from phsa_megatron.monitoring.records import read_records  # noqa: E402
from phsa_megatron.parallel.groups import initialize  # noqa: E402
from phsa_megatron.training.loop import train  # noqa: E402

WATCHED = (
    ("phsa_megatron.monitoring.recorder", "Recorder.log", "metrics.jsonl, W&B, TensorBoard"),
    ("phsa_megatron.monitoring.console", "Console.step", "console"),
    ("phsa_megatron.training.meter", "Meter.add", "FLOPs of documents"),
    ("phsa_megatron.training.meter", "Meter.record", "speed, memory, times of all processes"),
    ("phsa_megatron.training.alarms", "Alarms.after_step", "loss spikes"),
    ("phsa_megatron.training.alarms", "Alarms.after_record", "lost speed, stragglers"),
    ("phsa_megatron.training.phase_clock", "PhaseClock.enter", "time split"),
    ("phsa_megatron.training.loop", "norm_metrics", "norms by block"),
    ("phsa_megatron.training.loop", "_goodput", "goodput"),
    ("phsa_megatron.attention.max_logit", "MaxLogitRecorder.see", "largest logit"),
    ("phsa_megatron.training.information", "logit_metrics", "largest logit"),
    ("phsa_megatron.parallel.communication_clock", "CommunicationClock._mark", "time in communication"),
    ("phsa_megatron.parallel.communication_clock", "CommunicationClock.take", "time in communication"),
    ("phsa_megatron.training.loop", "capture_rng", "random generators, for a replay"),
)
WARM_UP_STEPS = 10


class Stopwatch:
    """Times calls by step."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))

    def watch(self, module: str, path: str, name: str) -> None:
        """Time every call of a function or method from now on."""
        owner: Any = importlib.import_module(module)
        *parts, attribute = path.split(".")
        for part in parts:
            owner = getattr(owner, part)
        original = getattr(owner, attribute)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name][self.step] += time.perf_counter() - began_s

        setattr(owner, attribute, timed)


def measure(config: TrainConfig) -> dict[str, Any]:
    """Train, and return the median step and what of it each part of monitoring took, in seconds."""
    from phsa_megatron.training import loop

    watch = Stopwatch()
    for module, path, name in WATCHED:
        watch.watch(module, path, name)
    make_step = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        watch.step += 1
        return make_step(*args, **kwargs)

    loop.train_step = counted
    prepare_run_folder(config)
    groups = initialize(config)
    try:
        train(config, groups)
        device = groups.device.type
    finally:
        groups.close()
    values = read_records(RunFolder.of(config).metrics_file).values_by_step
    counted_steps = range(WARM_UP_STEPS + 1, config.run.train_steps + 1)
    step_s = statistics.median(values[step]["perf/step_time_s"] for step in counted_steps)
    # The mean, because what happens every 100 steps is a part of every step.
    parts = {
        name: sum(by_step[step] for step in counted_steps) / len(counted_steps)
        for name, by_step in watch.seconds.items()
    }
    return {
        "device": device,
        "machine": platform.processor() or platform.machine(),
        "steps": len(counted_steps),
        "step_s": step_s,
        "parts_s": parts,
        "overhead_frac": sum(parts.values()) / step_s,
    }


def page(found: dict[str, Any], command: str) -> str:
    """Return the result as Markdown."""
    rows = [
        f"| {name} | {1e3 * seconds:.3f} | {seconds / found['step_s']:.3%} |"
        for name, seconds in sorted(found["parts_s"].items(), key=lambda item: -item[1])
    ]
    return "\n".join(
        [
            "# What monitoring takes of a step",
            "",
            f"`{command}`",
            "",
            f"{found['steps']} steps of {found['model']} ({found['tokens_per_step']:,} tokens a step) on "
            f"{found['device']}, after {WARM_UP_STEPS} that warm up; a step takes {found['step_s']:.3f} s. "
            f"All monitoring at default settings takes **{found['overhead_frac']:.2%}** of it; the goal is "
            "below 1%.",
            "",
            "| part | ms a step | share |",
            "|---|---|---|",
            *rows,
            "",
            "Every call of the loop that only watches is timed from inside, waits included. W&B's own "
            "process runs beside the step and is not in the count.",
            "",
        ]
    )


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="folder of monitoring_overhead.{json,md}")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        config = compose(
            [
                "recipe=phsa_demo_cpu",
                f"run.root_dir={folder}",
                f"run.train_steps={arguments.steps}",
                "optim.warmup_steps=5",
                "optim.decay_steps=10",
                "checkpoint.save_every_steps=0",
                "evaluate.every_steps=0",
                "run.sample_prompts=[]",
                *arguments.overrides,
            ]  # fmt: skip
        ).config
        found = measure(config)
    found |= {
        "model": config.model.name,
        "tokens_per_step": config.optim.global_batch_sequences * config.data.seq_len_tokens,
    }
    command = " ".join(
        ["python tests/e2e/monitoring_overhead.py", f"--steps {arguments.steps}", *arguments.overrides]
    )
    print(page(found, command))
    if arguments.output is not None:
        stem = arguments.output / "monitoring_overhead"
        stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(page(found, command), encoding="utf-8")


if __name__ == "__main__":
    main()
