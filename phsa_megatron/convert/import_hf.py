"""`phsa-train import-hf FOLDER RUN`: a Hugging Face folder as a run with one checkpoint, of step 0.

  phsa-train import-hf models/qwen3_0p6b runs/qwen3_0p6b
  phsa-train import-hf models/qwen3_0p6b runs/qwen3_0p6b attention=phsa_en_zh attention.infer_topk=4

Model settings come from config.json; what else a run needs, from KEY=VALUE arguments or a recipe. A run that
trains on starts from it with run.init_from=RUN, or from the folder itself with run.init_from=FOLDER. Works on
the CPU. The logits of both are compared at the end, which needs transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer as HuggingFaceTokenizer

from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.compose import OriginKind, compose_tree
from phsa_megatron.config.errors import CheckpointError, ConfigError, DataError
from phsa_megatron.config.huggingface import check_same_model, eos_id_of, model_settings, read_config
from phsa_megatron.config.resolved import to_config
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import Dtype, TrainConfig
from phsa_megatron.config.validate import validate
from phsa_megatron.convert import compare_logits
from phsa_megatron.convert.checkpoint_weights import on_one_cpu, skeleton, write_run
from phsa_megatron.convert.phsa_entry import KEY, check_same_table, read_phsa_entry
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.model.huggingface_weights import TensorFolder, fill_from_huggingface
from phsa_megatron.parallel.groups import initialize

# bf16 stays as it is; fp16 has more digits than bf16 and fits into fp32 without loss.
_RUN_DTYPE = {torch.bfloat16: Dtype.bf16, torch.float16: Dtype.fp32, torch.float32: Dtype.fp32}


def main(argv: list[str]) -> int:
    """Run the command.

    Raises:
        PhsaError: the folder cannot be imported, or the imported model is not the same.
    """
    parser = argparse.ArgumentParser(
        prog="phsa-train import-hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="config.json, *.safetensors and tokenizer.json")
    parser.add_argument("run", type=Path, help="the run folder to make; it must not exist")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe=NAME, attention=NAME, ...")
    parser.add_argument("--recipes-dir", type=Path, help="your own folder of recipes")
    parser.add_argument("--no-compare", action="store_true", help="do not compare logits with transformers")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.no_compare:
        compare_logits.require_transformers()
    folder: Path = arguments.folder
    config = run_settings(folder, arguments.run, arguments.overrides, arguments.recipes_dir)
    table = _table(folder, config)
    checkpoint = import_weights(folder, config)
    print(f"{checkpoint}: weights of {folder}, {config.run.dtype}")
    compare_logits.report(checkpoint, config, folder, table, compare=not arguments.no_compare)
    return 0


def run_settings(
    folder: Path, run: Path, overrides: list[str], recipes_dir: Path | None = None
) -> TrainConfig:
    """Return the settings of the run: the given ones, then the folder's, then what any run needs.

    Args:
        folder: the Hugging Face folder.
        run: the run folder.
        overrides: KEY=VALUE arguments, `recipe=NAME` and other choices among them.
        recipes_dir: a person's own recipes.

    Raises:
        ConfigError: a setting contradicts the folder, or breaks a rule.
    """
    theirs = read_config(folder)
    composed = compose_tree(overrides, recipes_dir)
    tree = composed.tree
    named = [text for text in overrides if text.startswith(("run.name=", "run.root_dir="))]
    if named:
        raise ConfigError(f"{' '.join(named)}: the run folder is the command's second argument, {run}")
    OmegaConf.update(tree, "run.name", run.name)  # a recipe has a name of its own
    OmegaConf.update(tree, "run.root_dir", str(run.parent))
    defaults = _from_folder(folder, theirs) | {
        "run.train_steps": 1,
        "data.name": "none",
        "optim.global_batch_sequences": 1,
        "optim.micro_batch_sequences": 1,
        "optim.lr": 1e-5,
        "cluster.name": "cpu",
    }
    missing = set(composed.missing())
    for key, value in defaults.items():
        origin = composed.provenance.get(key)
        if key in missing or origin is None or origin.kind == OriginKind.schema:
            OmegaConf.update(tree, key, value)
    still = [key for key in composed.missing() if key not in defaults]
    if still:
        raise ConfigError(f"{folder} does not say {', '.join(still)}: give KEY=VALUE")
    config = to_config(tree)
    entry = theirs.get(KEY)
    if entry is not None and not any(text.startswith(("attention", "recipe=")) for text in overrides):
        attention, _ = read_phsa_entry(entry, folder)
        config = dataclasses.replace(config, attention=attention)
    check_same_model(folder, config.model)
    validate(config, trains=False)
    return config


def _from_folder(folder: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """Return what a folder says about a run, by dotted key."""
    settings = {f"model.{key}": value for key, value in model_settings(theirs, folder).items()}
    settings["model.name"] = folder.name
    settings["run.dtype"] = _RUN_DTYPE[TensorFolder(folder).dtype()]
    settings["data.seq_len_tokens"] = theirs.get("max_position_embeddings", 2048)
    path = folder / "tokenizer.json"
    if path.is_file():
        settings["data.tokenizer_file"] = str(path)
        eos = eos_id_of(theirs)
        token = None if eos is None else HuggingFaceTokenizer.from_file(str(path)).id_to_token(eos)
        if token is not None:
            settings["data.eod_token"] = token
    return settings


def _table(folder: Path, config: TrainConfig) -> PunctuationTable:
    """Return the punctuation set; the one in config.json, if there is one for these settings, must agree."""
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"data.tokenizer_file={config.data.tokenizer_file} has {tokenizer.vocab_size} ids, the model "
            f"{config.model.vocab_size}: it is another model's tokenizer"
        )
    table = table_of(tokenizer.decoded_tokens(), config.attention)
    entry = read_config(folder).get(KEY)
    if entry is not None:
        _, theirs = read_phsa_entry(entry, folder)
        if theirs.name == table.name:
            check_same_table(table, theirs, f"data.tokenizer_file={config.data.tokenizer_file}")
    return table


def import_weights(folder: Path, config: TrainConfig) -> Path:
    """Write the run folder; return its checkpoint.

    Args:
        folder: the Hugging Face folder.
        config: settings of the run; written as they are, whatever works here.

    Raises:
        CheckpointError: the run folder exists, weights would be rounded, or a tensor does not fit.
    """
    run = RunFolder.of(config)
    if run.path.exists():
        raise CheckpointError(f"{run.path} exists already: nothing is overwritten; choose another folder")
    dtype = TensorFolder(folder).dtype()
    if config.run.dtype == Dtype.bf16 and dtype != torch.bfloat16:
        raise CheckpointError(
            f"run.dtype=bf16, but {folder} holds {dtype}: weights would be rounded, and the run would not be "
            "the same model; set run.dtype=fp32. A later stage may still train in bf16 (run.init_from)"
        )
    here = on_one_cpu(config)
    groups = initialize(here)
    try:
        # Without memory first: fresh random weights would be drawn only to be overwritten.
        model = skeleton(here, groups).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # rows that only pad the vocabulary
        fill_from_huggingface(folder, here, [model])
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        return write_run(model, config, groups, tokenizer)
    finally:
        groups.close()
