"""From tensor and pipeline parallelism to one file and back: the same bits in every process's weights."""

import pytest
from safetensors.torch import load_file, save_file

from phsa_megatron.config.errors import CheckpointError
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.convert import compare_logits, export_hf, import_hf
from phsa_megatron.convert.checkpoint_weights import settings_of
from phsa_megatron.training.weights import find_checkpoint
from tests.training.checkpoint_runs import SCRIPT_PROLOGUE, run_script_in_ranks, write_script

FOUR_PROCESSES = (
    SCRIPT_PROLOGUE
    + """
    import torch, zlib
    from phsa_megatron.training import stages

    ROOT = Path({root!r})

    def config_of(name, tied, init_from=None):
        config = t.tiny_config(
            ROOT,
            run={{"name": name, "init_from": init_from}},
            model={{"num_layers": 4, "tie_embeddings": tied, "init_std": 0.2}},
            attention={{"kind": "phsa", "block_tokens": 4, "init_tokens": 4, "local_tokens": 8}},
            data={{"tokenizer_file": {tokenizer!r}, "seq_len_tokens": 128}},
            parallel={{"tensor_size": 2, "pipeline_size": 2, "virtual_pipeline_size": 2}},
        )
        config.cluster.processes_per_node = 4
        return config

    def weights(run):
        return {{name: p.detach().clone() for name, p in run.parts.named_parameters()}}

    def first(tied):
        with t.Run(config_of(f"first_{{tied}}", tied)) as run:
            for name, parameter in run.parts.named_parameters():
                if "norm" in name:  # all ones would not show norms that change places
                    seed = zlib.crc32(name.encode()) + run.groups.collection.pp.rank()
                    draw = torch.Generator().manual_seed(seed)
                    parameter.data += torch.randn(parameter.shape, generator=draw) * 0.1
            run.save(must_succeed=True)
            torch.save(weights(run), ROOT / f"weights_{{tied}}_{{run.groups.rank}}.pt")

    def back(tied):
        config = config_of(f"stage_{{tied}}", tied, str(ROOT / f"back_{{tied}}"))
        with t.Run(config) as run:
            fresh = weights(run)
            stages.init_from(config, run.parts, run.checkpointer)
            expected = torch.load(ROOT / f"weights_{{tied}}_{{run.groups.rank}}.pt")
            found = weights(run)
            assert expected.keys() == found.keys()
            for name, value in found.items():
                real = len(value)
                if "word_embeddings" in name or "output_layer" in name:  # rows past 120 only pad
                    real = min(real, 120 - run.groups.collection.tp.rank() * real)
                assert torch.equal(value[:real], expected[name][:real]), name
            assert not all(torch.equal(fresh[name], value) for name, value in found.items())

    for tied in (True, False):
        (back if (ROOT / "back_True").exists() else first)(tied)
    print("done", flush=True)
"""
)


@pytest.mark.slow
def test_two_by_two_processes_to_one_file_and_back(tmp_path, tokenizer_file):
    pytest.importorskip("transformers", reason="the other implementation to compare with")
    script = write_script(tmp_path, FOUR_PROCESSES, tokenizer=str(tokenizer_file))
    run_script_in_ranks(script, 4)
    for tied in (True, False):
        run, back = (tmp_path / "runs" / f"{name}_{tied}" for name in ("first", "back"))
        folder = tmp_path / f"file_{tied}"
        assert export_hf.main([str(run), str(folder)]) == 0  # compares logits
        assert import_hf.main([str(folder), str(back)]) == 0  # compares logits
        tensors = load_file(folder / "model.safetensors")
        assert ("lm_head.weight" in tensors) is not tied
    checkpoint = find_checkpoint(RunFolder(run), None)
    config = settings_of(checkpoint)
    table = import_hf._table(folder, config)
    dense, sparse = compare_logits.compare_logits(checkpoint, config, folder, table)
    assert dense.largest < 1e-5 * dense.scale and sparse.largest < 1e-4 * sparse.scale
    # Negative control: the shares of two processes in the wrong order.
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not the same model"):
        compare_logits.compare_logits(checkpoint, config, folder, table)
    run_script_in_ranks(script, 4)
