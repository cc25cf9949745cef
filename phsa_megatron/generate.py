"""Continue texts with a trained model: one after another at a prompt, or a file of them.

  phsa-generate runs/phsa_demo_cpu                              type a text, see it continued
  phsa-generate runs/phsa_demo_cpu --prompt "The rule is"       once (give --prompt again for more)
  phsa-generate runs/demo --input prompts.jsonl --output out.jsonl --batch-size 32
  phsa-generate runs/demo --topk 16 --temperature 0.8 --top-p 0.95 --seed 7

RUN is a run folder: its newest checkpoint, whatever layout it was trained in, is loaded into this process.
An input file is .jsonl (objects with "prompt"; other keys are kept) or has one prompt a line. Each line of
the output is the input's object with completion, num_prompt_tokens, num_tokens and finish_reason ("stop": the
end-of-document token came; "length": --max-tokens). A continuation depends on the seed and on the prompt's
place in the file, not on the batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phsa_megatron.config.errors import ConfigError, PhsaError

if TYPE_CHECKING:
    from phsa_megatron.config.schema import TrainConfig
    from phsa_megatron.inference.texts import TextGenerator


def main(argv: list[str] | None = None) -> int:
    """Run `phsa-generate` and return its exit code: 2 for an error that the message explains."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    try:
        with _opened(arguments) as texts:
            if arguments.input is not None:
                _whole_file(texts, arguments)
            elif arguments.prompt:
                _print_all(texts, arguments.prompt)
            else:
                _converse(texts)
    except PhsaError as error:
        print(f"phsa-generate: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("phsa_"):
            raise
        print(
            f"phsa-generate: this command needs the package '{error.name}', which is not installed here; "
            "install phsa-megatron[cpu] or phsa-megatron[gpu]",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\nphsa-generate: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="phsa-generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder with a checkpoint")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    texts = parser.add_argument_group("texts (none of these: interactive)")
    texts.add_argument("--prompt", action="append", metavar="TEXT", help="continue this; may be repeated")
    texts.add_argument("--input", type=Path, metavar="FILE", help="continue every prompt of a file")
    texts.add_argument("--output", type=Path, metavar="FILE", help="JSON lines; needed with --input")
    texts.add_argument("--overwrite", action="store_true", help="replace an --output that exists")
    choice = parser.add_argument_group("choice of tokens")
    choice.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most (128)")
    choice.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (0)")
    choice.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; 1 is off (1)")
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    model = parser.add_argument_group("model")
    model.add_argument("--topk", type=int, metavar="K", help="selected blocks; default: the run's")
    model.add_argument("--impl", choices=("reference", "triton"), help="of the ops; default: the run's")
    model.add_argument("--device", choices=("cpu", "cuda"), help="default: the run's")
    model.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts together (8)")
    model.add_argument("--cuda-graph", action="store_true", help="replay the step of a token as one graph")
    arguments = parser.parse_args(argv)
    if (arguments.input is None) != (arguments.output is None):
        parser.error("--input and --output go together")
    if arguments.input is not None and arguments.prompt:
        parser.error("give --prompt or --input, not both")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size={arguments.batch_size} must be at least 1")
    return arguments


def _settings(arguments: argparse.Namespace) -> TrainConfig:
    """Return the run's settings with what the command changes."""
    from phsa_megatron.config.compose import load
    from phsa_megatron.config.run_folder import RunFolder
    from phsa_megatron.config.schema import Device, KernelImpl

    config = load(RunFolder(arguments.run).existing_config())
    if arguments.device is not None:
        config.cluster.device = Device(arguments.device)
    if arguments.impl is not None:
        config.attention.impl = KernelImpl(arguments.impl)
    return config


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[TextGenerator]:
    """Load the model and yield what continues texts with it."""
    if arguments.output is not None and arguments.output.exists() and not arguments.overwrite:
        raise ConfigError(f"--output={arguments.output} exists: choose another file or add --overwrite")
    config = _settings(arguments)
    from phsa_megatron.config.environment import process_environment
    from phsa_megatron.config.schema import Device

    os.environ.update(process_environment(config))
    # Torch may be imported from here on, and megatron only after the shim.
    from phsa_megatron.parallel import cpu_shim

    cpu_shim.install(hide_gpu=config.cluster.device is Device.cpu)
    from phsa_megatron.attention.punctuation import table_of
    from phsa_megatron.config.run_folder import RunFolder
    from phsa_megatron.data.tokenizer import Tokenizer
    from phsa_megatron.inference.generator import Generator
    from phsa_megatron.inference.sampling import Sampling
    from phsa_megatron.inference.texts import TextGenerator
    from phsa_megatron.parallel.groups import initialize
    from phsa_megatron.training.commit import read_marker
    from phsa_megatron.training.replay import single_process
    from phsa_megatron.training.weights import find_checkpoint, load_model

    try:
        sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed, arguments.max_tokens)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    checkpoint = find_checkpoint(RunFolder(arguments.run), arguments.step)
    config = single_process(config)
    groups = initialize(config)
    try:
        model = load_model(checkpoint, config, groups)
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        table = table_of(tokenizer.decoded_tokens(), config.attention).to(groups.device)
        generator = Generator(
            model,
            config,
            table,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            topk=arguments.topk,
            cuda_graph=arguments.cuda_graph,
        )
        step = read_marker(checkpoint).step
        print(f"{arguments.run}, step {step}, {_described(config, generator.topk)}", file=sys.stderr)
        yield TextGenerator(generator, tokenizer, sampling)
    finally:
        groups.close()


def _described(config: TrainConfig, topk: int) -> str:
    attention = config.attention
    where = f"{attention.impl.value} on {config.cluster.device.value}"
    if attention.kind.value == "dense":
        return f"dense attention, {where}"
    trained = "" if topk == attention.train_topk else f" (trained with {attention.train_topk})"
    return f"{attention.selector.value}, k = {topk}{trained}, {where}"


def _whole_file(texts: TextGenerator, arguments: argparse.Namespace) -> None:
    """Write the completions of a file, each batch as soon as it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from phsa_megatron.inference.texts import read_prompts

    records = read_prompts(arguments.input)
    started, num_tokens = time.perf_counter(), 0
    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, arguments.output.open("w") as output:
        task = bar.add_task("prompts", total=len(records), speed="")

        def after_batch(tokens: int) -> None:
            nonlocal num_tokens
            num_tokens += tokens
            speed = num_tokens / (time.perf_counter() - started)
            bar.update(task, speed=f"{speed:,.0f} tokens/s")

        for record in texts.complete(records, arguments.batch_size, after_batch):
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            output.flush()
            bar.advance(task)
    seconds = time.perf_counter() - started
    print(
        f"{len(records)} prompts, {num_tokens:,} tokens in {seconds:.1f} s, cache of a batch "
        f"{texts.generator.cache_bytes / 2**20:.1f} MiB: {arguments.output}",
        file=sys.stderr,
    )


def _print_all(texts: TextGenerator, prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts):
        print(prompt, end="", flush=True)
        texts.stream(prompt, lambda piece: print(piece, end="", flush=True), number)
        print()


def _converse(texts: TextGenerator) -> None:
    """Read a line, continue it, until the end of input."""
    print("Type the beginning of a text; an empty line or Ctrl-D ends.", file=sys.stderr)
    for number in range(sys.maxsize):
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt:
            return
        print(prompt, end="", flush=True)
        texts.stream(prompt, lambda piece: print(piece, end="", flush=True), number)
        print()


if __name__ == "__main__":
    sys.exit(main())
