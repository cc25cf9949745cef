"""`phsa-train export-hf RUN FOLDER`: a run's checkpoint as a Hugging Face folder.

  phsa-train export-hf runs/mine models/mine
  phsa-train export-hf runs/mine models/mine_step_2000 --step 2000

Works on the CPU, weight by weight, whatever layout the checkpoint was written by. The folder is a Qwen3 (a
Llama where queries and keys have no norms); its config.json carries the PHSA settings and the punctuation set
with its hash. The logits of both are compared at the end, which needs transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.huggingface import CONFIG_NAME, huggingface_config
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import TrainConfig
from phsa_megatron.convert import compare_logits
from phsa_megatron.convert.checkpoint_weights import (
    StreamedWeights,
    Weight,
    check_same_tokenizer,
    settings_of,
)
from phsa_megatron.convert.folder_writer import Piece, new_folder, write_tensors
from phsa_megatron.convert.phsa_entry import KEY, phsa_entry
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.model.huggingface_weights import huggingface_tensors
from phsa_megatron.parallel.groups import Groups, initialize
from phsa_megatron.training.commit import read_marker
from phsa_megatron.training.weights import find_checkpoint

GIB = 1 << 30


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: the run cannot be exported, or the exported model is not the same.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train export-hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="a run folder with a checkpoint")
    parser.add_argument("folder", type=Path, help="the folder to make; it must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, if the run's is no longer in place")
    parser.add_argument("--max-file-gib", type=float, default=4.0, help="size of a safetensors file")
    parser.add_argument("--no-compare", action="store_true", help="do not compare logits with transformers")
    arguments = parser.parse_args(argv)
    if not arguments.no_compare:
        compare_logits.require_transformers()
    run = RunFolder(arguments.run)
    checkpoint = find_checkpoint(run, arguments.step)
    config = settings_of(checkpoint)
    tokenizer = Tokenizer.from_file(arguments.tokenizer or config.data.tokenizer_file, config.data.eod_token)
    check_same_tokenizer(checkpoint, tokenizer)
    table = table_of(tokenizer.decoded_tokens(), config.attention)
    num_bytes = export(checkpoint, config, arguments.folder, tokenizer, table, arguments.max_file_gib)
    print(f"{arguments.folder}: {num_bytes / GIB:.2f} GiB of weights from {checkpoint}")
    compare_logits.report(checkpoint, config, arguments.folder, table, compare=not arguments.no_compare)
    return 0


def export(
    checkpoint: Path,
    config: TrainConfig,
    folder: Path,
    tokenizer: Tokenizer,
    table: PunctuationTable,
    max_file_gib: float = 4.0,
) -> int:
    """Write the folder; return the bytes of all weights.

    Args:
        checkpoint: a committed checkpoint.
        config: its settings for one process on the CPU.
        folder: must not exist; appears when it is complete.
        tokenizer: of the run; copied into the folder.
        table: punctuation set of the run.
        max_file_gib: limit of a safetensors file; one file's tensors are in memory at a time.

    Raises:
        ConfigError: the model has parts without a counterpart.
        CheckpointError: the folder exists, or the checkpoint cannot be read.
    """
    settings = huggingface_config(
        config.model, config.run.dtype, config.data.seq_len_tokens, tokenizer.eod_id
    )
    entry = phsa_entry(config.attention, table)
    entry["source"] = {"run": config.run.name, "step": read_marker(checkpoint).step}
    groups = initialize(config)
    try:
        with new_folder(folder) as partial:
            num_bytes = write_tensors(partial, _pieces(checkpoint, config, groups), int(max_file_gib * GIB))
            _write_json(partial / CONFIG_NAME, settings | {KEY: entry})
            _write_json(partial / "generation_config.json", {"eos_token_id": tokenizer.eod_id})
            shutil.copyfile(tokenizer.path, partial / "tokenizer.json")
            _write_json(
                partial / "tokenizer_config.json",
                {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "eos_token": tokenizer.eod_token,
                    "pad_token": tokenizer.eod_token,
                    "model_max_length": config.data.seq_len_tokens,
                },
            )
    finally:
        groups.close()
    return num_bytes


def _pieces(checkpoint: Path, config: TrainConfig, groups: Groups) -> list[Piece]:
    stream = StreamedWeights(checkpoint, config, groups)

    def piece(weight: Weight) -> Piece:
        def tensors(value: Any) -> dict[str, Any]:
            return huggingface_tensors(weight.name, weight.layer, value, config.model)

        return Piece(tensors(weight.shape), lambda: tensors(stream.read(weight)))

    return [piece(weight) for weight in stream.weights]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
