"""`phsa-train information-loss RUN`: what selection loses in a trained model, by selector, k, layer and head.

  phsa-train information-loss runs/phsa_demo_cpu
  phsa-train information-loss runs/dense --selectors phsa mean_pool minmax --topk 1 2 4 8 16

Reads the newest checkpoint and goes through validation text. Each layer computes the attention that is
measured, with these blocks and this k (--dense: full causal attention, so that all selectors see the same
queries). Writes information_loss.json and two plots into RUN/information_loss, or into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from phsa_megatron.attention.core_attention import PHSACoreAttention
from phsa_megatron.attention.information_loss import Information, InformationRecorder
from phsa_megatron.attention.punctuation import table_of
from phsa_megatron.config import compose
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, Selector, TrainConfig
from phsa_megatron.config.selector_kinds import (
    WITH_PARAMETERS,
    WITHOUT_SECOND_BRANCH,
    WITHOUT_SELECTION,
    inference_topk,
)
from phsa_megatron.data.batches import Batch, BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.evaluation import plots
from phsa_megatron.parallel.groups import Groups, initialize
from phsa_megatron.training.checkpoint import Checkpointer
from phsa_megatron.training.forward_step import ForwardStep
from phsa_megatron.training.information import new_recorder
from phsa_megatron.training.optimizer import Parts, build_parts
from phsa_megatron.training.replay import single_process
from phsa_megatron.training.step import forward_backward
from phsa_megatron.training.weights import find_checkpoint


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: the run has no checkpoint, or cannot be measured so.
    """
    arguments = _parse(argv)
    folder = RunFolder(arguments.run)
    config = single_process(compose.load(folder.existing_config()))
    # Weights are the same: a dense run is measured as it would select.
    config.attention.kind = AttentionKind.phsa
    groups = initialize(config)
    try:
        results = measure(folder, config, groups, arguments)
    finally:
        groups.close()
    out: Path = arguments.out or arguments.run / "information_loss"
    write(out, results)
    Console().print(_table(results))
    print(f"written: {out}/information_loss.json, mass.png, layers_and_heads.png")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="phsa-train information-loss",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder with a checkpoint")
    choices = [selector.value for selector in Selector if selector not in WITHOUT_SELECTION]
    parser.add_argument("--selectors", nargs="+", choices=choices, help="default: the run's own")
    parser.add_argument("--topk", type=int, nargs="+", help="default: the run's own")
    parser.add_argument("--sequences", type=int, default=16, help="validation sequences to go through")
    parser.add_argument("--rows", type=int, default=64, help="queries looked at per layer and micro-batch")
    parser.add_argument("--dense", action="store_true", help="layers compute full causal attention")
    parser.add_argument("--out", type=Path, help="folder of the results")
    arguments = parser.parse_args(argv)
    if min([arguments.sequences, arguments.rows, *(arguments.topk or [])]) < 1:
        parser.error("--sequences, --rows and --topk must be at least 1")
    return arguments


def measure(
    folder: RunFolder, config: TrainConfig, groups: Groups, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one record for each selector and k, sums by layer and head among it."""
    checkpoint = find_checkpoint(folder)
    parts = build_parts(config, groups)
    step = Checkpointer(folder, config, groups).load_from(checkpoint, parts, weights_only=True).step
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    reader = BatchReader(config, "valid", tokenizer)
    count = min(arguments.sequences, reader.num_sequences or 0)
    batches = [reader.micro_batch(i, 1) for i in range(count)]
    if not batches:
        raise ConfigError(f"{folder.path}: this run has no validation text (data.sources.NAME.valid_prefix)")
    own = config.attention
    names = arguments.selectors or [own.selector.value]
    todo = [
        (swapped(own, Selector(name)), k) for name in names for k in arguments.topk or [inference_topk(own)]
    ]
    results = []
    for attention, topk in track(todo, "measuring", console=Console(stderr=True), transient=True):
        table = table_of(tokenizer.decoded_tokens(), attention).to(groups.device)
        changed = dataclasses.replace(config, attention=attention)
        recorder = new_recorder(changed, groups, arguments.rows)
        forward = ForwardStep(changed, table, topk, groups, recorder, is_dense=arguments.dense)
        with attending(parts.model, attention):
            for batch in batches:
                _forward(parts, batch, forward)
        results.append(_record(attention, topk, recorder, step, count))
    return results


def swapped(own: AttentionConfig, selector: Selector) -> AttentionConfig:
    """Return the run's settings with another selector; one without a second branch has lambda 1.

    Raises:
        ConfigError: the checkpoint has no weights for the selector, or the layers are NSA's.
    """
    if selector == own.selector:
        return own
    nsa = own.selector == Selector.nsa
    if selector in WITH_PARAMETERS or nsa:
        why = "which is more than a choice of blocks" if nsa else "and has none of its weights"
        raise ConfigError(
            f"--selectors {selector}: this run was trained with attention.selector={own.selector}, {why}; "
            f"measure --selectors {own.selector}"
        )
    lam = 1.0 if selector in WITHOUT_SECOND_BRANCH else own.mean_weight_frac
    return dataclasses.replace(own, selector=selector, mean_weight_frac=lam, dense_layers=[])


@torch.no_grad()
def _forward(parts: Parts, batch: Batch, forward: ForwardStep) -> None:
    for chunk in parts.model:
        chunk.eval()
    forward_backward(parts, [batch], forward, forward_only=True)


@contextmanager
def attending(chunks: Sequence[torch.nn.Module], attention: AttentionConfig) -> Iterator[None]:
    """Give every layer these settings for a while."""
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, PHSACoreAttention)]
    before = [layer.attention for layer in layers]
    for layer in layers:
        layer.attention = attention
    try:
        yield
    finally:
        for layer, settings in zip(layers, before, strict=True):
            layer.attention = settings


def _record(
    attention: AttentionConfig, topk: int, recorder: InformationRecorder, step: int, sequences: int
) -> dict[str, Any]:
    by_head = [[vars(Information.of(head)) for head in layer] for layer in recorder.sums]
    return {
        "selector": attention.selector.value,
        "topk": topk,
        "step": step,
        "sequences": sequences,
        "windows": [attention.init_tokens, attention.local_tokens],
        "block_tokens": attention.block_tokens,
        "total": vars(recorder.total()),
        "layers": {number: vars(layer) for number, layer in recorder.layers().items()},
        "heads": by_head,
    }


def write(out: Path, results: list[dict[str, Any]]) -> None:
    """Write information_loss.json (nan as null), mass.png and layers_and_heads.png."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(results), indent=1)
    (out / "information_loss.json").write_text(text + "\n", encoding="utf-8")
    names = dict.fromkeys(record["selector"] for record in results)
    series = {
        name: {r["topk"]: r["total"]["kept_mass_frac"] for r in results if r["selector"] == name}
        for name in names
    }
    series["oracle"] = {r["topk"]: r["total"]["oracle_mass_frac"] for r in results}
    plots.curves(
        out / "mass.png",
        series,
        title="dense attention mass that is kept",
        x_label="selected blocks (k)",
        y_label="share",
        levels={"window only": results[0]["total"]["window_mass_frac"]},
    )
    first = results[0]
    lost = [[1 - head["kept_mass_frac"] for head in layer] for layer in first["heads"]]
    title = f"mass lost by {first['selector']}, k = {first['topk']}"
    plots.layers_and_heads(out / "layers_and_heads.png", lost, title=title, label="share of mass lost")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and value != value else value


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table("selector", "k", "kept", "window", "oracle", "recall", "oracle's gain recovered")
    for record in results:
        shares = [f"{value:.4f}" for value in record["total"].values()]
        table.add_row(record["selector"], str(record["topk"]), *shares)
    return table
