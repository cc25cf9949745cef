"""`phsa-train profile`: the first steps of a recipe in one process, traced; no run folder, no checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from phsa_megatron.config.compose import compose
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import ProfileConfig, TrainConfig
from phsa_megatron.config.validate import validate
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.profiling import StepProfiler
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.replay import single_process
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import micro_batch_starts, train_step

_DESCRIPTION = """\
Trace steps of a recipe with torch's profiler, in this one process: a Chrome trace (open it in Perfetto or
chrome://tracing), a table of kernels, and on a GPU a snapshot of memory. The steps before the traced ones
warm up. Nothing is saved. To trace a run that is under way or has several processes, start it again with
monitoring.profile.first_step=N: process 0 writes RUN/profile.

  phsa-train profile recipe=phsa_demo_cpu --steps 3-5
"""
_TABLE_LINES = 24


def main(argv: list[str]) -> int:
    """Run the command; returns 0.

    Raises:
        PhsaError: the settings are wrong, or the steps cannot be made here.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train profile",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="recipe and settings as for training"
    )
    parser.add_argument("--recipes-dir", type=Path, help="your own folder of recipes")
    parser.add_argument("--steps", default="4-6", help="FIRST-LAST, from 1")
    parser.add_argument("--output", type=Path, default=Path("profile"), help="folder of the files")
    arguments = parser.parse_intermixed_args(argv)
    config = single_process(compose(arguments.overrides, arguments.recipes_dir).config)
    validate(config)
    settings = _steps(arguments.steps)
    for path in profile_steps(config, settings, arguments.output):
        print(path)
        if path.name.endswith("kernels.txt"):
            print("\n".join(path.read_text(encoding="utf-8").splitlines()[:_TABLE_LINES]))
    return 0


def _steps(text: str) -> ProfileConfig:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(f"--steps={text}: it must be FIRST-LAST or one number, from 1, such as 4-6")
    return ProfileConfig(first_step=first, num_steps=last - first + 1)


def profile_steps(config: TrainConfig, settings: ProfileConfig, output: Path) -> list[Path]:
    """Makes the steps up to the last traced one from fresh weights, and returns the files written."""
    groups = initialize(config)
    progress = Progress()
    try:
        parts = build_parts(config, groups)
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        reader = BatchReader(config, "train", tokenizer)
        table, state = punctuation_table(config, tokenizer, groups), TrainState()
        size, last = config.optim.micro_batch_sequences, settings.first_step + settings.num_steps - 1
        with StepProfiler(settings, output, progress, groups.device, nvtx=config.monitoring.nvtx) as profiler:
            for step in range(1, last + 1):
                profiler.before_step(step)
                progress.enter("data", step=step)
                starts = micro_batch_starts(config, groups, state.consumed_sequences)
                train_step(parts, [reader.micro_batch(s, size) for s in starts], table, state, progress)
                progress.step_done()
    finally:
        groups.close()
    return profiler.files
