"""phsa-generate on a run trained here: checkpoint, texts, files, refusals."""

import json

import pytest

from phsa_megatron import generate
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.inference.generate import generate as without_cache
from phsa_megatron.parallel.groups import initialize
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.weights import find_checkpoint, load_model

PROMPTS = ["the cat", "a dog and then it ran far away, over the river! under", ""]


@pytest.fixture
def trained(tiny_config, run):
    config = tiny_config(**{"run.train_steps": 4})
    return config, run(config).folder


def test_the_command_continues_texts_and_files(trained, tmp_path, capsys, monkeypatch):
    config, folder = trained
    # What the sampler of training gives with the loaded weights, token by token from scratch.
    groups = initialize(config)
    model = load_model(find_checkpoint(folder), config, groups)
    tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
    wanted = []
    for prompt in PROMPTS:
        ids = without_cache(
            [model],
            tokenizer.encode(prompt) or [tokenizer.eod_id],
            9,
            config=config,
            groups=groups,
            table=punctuation_table(config, tokenizer, groups),
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
        )
        wanted.append(tokenizer.decode([i for i in ids if i != tokenizer.eod_id]))
    groups.close()

    source, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": p, "id": i}) + "\n\n" for i, p in enumerate(PROMPTS)))
    command = [str(folder.path), "--max-tokens", "9"]
    assert generate.main([*command, "--input", str(source), "--output", str(out), "--batch-size", "2"]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["completion"] for record in records] == wanted
    assert [record["id"] for record in records] == [0, 1, 2]
    assert records[2]["num_prompt_tokens"] == 1  # the end-of-document token stands for nothing
    assert all(record["finish_reason"] in ("stop", "length") for record in records)
    said = capsys.readouterr().err
    assert "step 4, phsa, k = 2 (trained with 1), reference on cpu" in said and "3 prompts" in said

    assert generate.main([*command, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]) == 0
    assert capsys.readouterr().out == "".join(p + w + "\n" for p, w in zip(PROMPTS[:2], wanted, strict=False))
    typed = iter([PROMPTS[0], ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert generate.main(command) == 0
    assert capsys.readouterr().out == PROMPTS[0] + wanted[0] + "\n"

    for extra, message in (
        (["--input", str(source), "--output", str(out)], "exists: choose another file or add --overwrite"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2.0 must be above 0"),
        (["--prompt", "a", "--step", "3"], "no committed checkpoint of step 3; it has: 4"),
        (["--prompt", "a", "--cuda-graph"], "cuda_graph needs a CUDA device"),
    ):
        assert generate.main([*command, *extra]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x"], "--input and --output go together"),
        (["--prompt", "a", "--input", "x", "--output", "y"], "not both"),
        (["--batch-size", "0"], "--batch-size=0 must be at least 1"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        generate.main(["runs/x", *arguments])
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert generate.main([str(tmp_path)]) == 2
    assert "is no run folder: it has no config.yaml" in capsys.readouterr().err


def test_help_shows_commands_and_every_option(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    text = capsys.readouterr().out
    for word in ("phsa-generate runs/phsa_demo_cpu", "--top-p", "--topk", "--input", "finish_reason"):
        assert word in text
