"""From tensor and pipeline parallelism to one file and back: the same bits in every process's weights."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.convert import compare_logits, export_hf, import_hf
from phsa_megatron.convert.checkpoint_weights import find_checkpoint, settings_of
from tests.training.checkpoint_runs import SCRIPT_PROLOGUE, script_environment, write_script

FOUR_PROCESSES = (
    SCRIPT_PROLOGUE
    + """
    import torch
    from phsa_megatron.training import stages

    def config_of(name, init_from=None):
        config = t.tiny_config(
            Path({root!r}),
            run={{"name": name, "init_from": init_from}},
            model={{"num_layers": 4, "tie_embeddings": {tied}, "init_std": 0.2}},
            attention={{"kind": "phsa", "block_tokens": 4, "init_tokens": 4, "local_tokens": 8}},
            data={{"tokenizer_file": {tokenizer!r}, "seq_len_tokens": 128}},
            parallel={{"tensor_size": 2, "pipeline_size": 2, "virtual_pipeline_size": 2}},
        )
        config.cluster.processes_per_node = 4
        return config

    def weights(run):
        return {{name: p.detach().clone() for name, p in run.parts.named_parameters()}}

    stage = Path({back!r}).exists()
    with t.Run(config_of("stage", {back!r}) if stage else config_of("first")) as run:
        kept = Path({root!r}) / f"weights_{{run.groups.rank}}.pt"
        if stage:
            stages.init_from(run.config, run.parts, run.checkpointer)
            expected, found = torch.load(kept), weights(run)
            for name, value in found.items():
                real = value
                if "word_embeddings" in name or "output_layer" in name:  # rows past 120 only pad
                    first = run.groups.collection.tp.rank() * len(value)
                    real = value[: max(0, 120 - first)]
                assert torch.equal(real, expected[name][: len(real)]), name
            assert expected.keys() == found.keys()
        else:
            run.train(1)
            run.save(must_succeed=True)
            torch.save(weights(run), kept)
        print("done", flush=True)
"""
)


def four_processes(script):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    result = subprocess.run(
        [*torchrun, str(script)], capture_output=True, text=True, env=script_environment(), timeout=400
    )
    assert result.stdout.count("done") == 4, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_two_by_two_processes_to_one_file_and_back(tmp_path, tokenizer_file, tied):
    pytest.importorskip("transformers", reason="the other implementation to compare with")
    back = tmp_path / "back"
    script = write_script(tmp_path, FOUR_PROCESSES, tied=tied, tokenizer=str(tokenizer_file), back=str(back))
    four_processes(script)
    first = RunFolder(tmp_path / "runs" / "first")
    assert export_hf.main([str(first.path), str(tmp_path / "file")]) == 0  # compares logits
    tensors = load_file(tmp_path / "file" / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert import_hf.main([str(tmp_path / "file"), str(back)]) == 0  # compares logits
    four_processes(script)
    checkpoint = find_checkpoint(first, None)
    config = settings_of(checkpoint)
    table = import_hf._table(tmp_path / "file", config)
    dense, sparse = compare_logits.compare_logits(checkpoint, config, tmp_path / "file", table)
    assert dense.largest < 1e-5 * dense.scale and sparse.largest < 1e-4 * sparse.scale
    # Negative control: the shares of two processes in the wrong order.
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)
    save_file(tensors, tmp_path / "file" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the same model"):
        compare_logits.compare_logits(checkpoint, config, tmp_path / "file", table)
