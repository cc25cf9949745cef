from __future__ import annotations

import json
import subprocess
import sys

import pytest

from phsa_megatron.config.errors import ConfigError, DataError
from phsa_megatron.data import commands
from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.indexed import IndexedSource
from phsa_megatron.data.show import show_step
from phsa_megatron.data.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            commands.prepare_data,
            ["--max-bad-records", "PREFIX.json", "uint16", "goes on from the finished parts"],
        ),
        (commands.prepare_demo, ["--output", "8,192-token"]),
        (commands.prepare_tokenizer, ["qwen3", "151,669"]),
        (commands.show_batch, ["step=", "rows="]),
    ],
)
def test_help_explains_the_command(command, expected, capsys):
    with pytest.raises(SystemExit) as left:
        command(["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in expected:
        assert words in text


def test_help_answers_without_torch():
    code = (
        "import sys\n"
        "from phsa_megatron.data.commands import prepare_data\n"
        "try:\n    prepare_data(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_prepare_data_writes_a_set_and_says_what_is_in_it(tmp_path, tokenizer_file, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "one two"}\n{"body": ""}\nbroken\n')
    arguments = [
        "--input",
        str(source),
        "--output",
        str(tmp_path / "set"),
        "--tokenizer",
        str(tokenizer_file),
    ]
    arguments += ["--text-field", "body", "--workers", "1"]
    with pytest.raises(DataError, match="1 bad records"):
        commands.prepare_data(arguments)
    assert commands.prepare_data([*arguments, "--max-bad-records", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1 documents" in printed
    assert "1 empty documents, 1 bad records" in printed
    assert f"left out {source}:3" in printed
    sha256 = Tokenizer.from_file(tokenizer_file, "<|endoftext|>").sha256
    assert len(IndexedSource(tmp_path / "set", sha256)) == 1


def test_prepare_tokenizer_writes_qwen3_and_keeps_what_is_there(tmp_path, capsys):
    output = tmp_path / "new" / "tokenizer.json"
    assert commands.prepare_tokenizer(["qwen3", "--output", str(output)]) == 0
    tokenizer = Tokenizer.from_file(output, "<|endoftext|>")
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.sha256 in capsys.readouterr().out
    with pytest.raises(DataError, match="--overwrite"):
        commands.prepare_tokenizer(["qwen3", "--output", str(output)])


def test_a_step_is_shown_with_the_text_that_is_trained_on(mixture):
    config = mixture()
    config.optim.global_batch_sequences = 4
    text = "\n".join(line.text for line in show_step(config, step=3, num_rows=2))
    reader = BatchReader(config, "train")
    assert text.startswith("step 3: sequences 8 to 11 of 32 tokens; showing 2.")
    assert "sequence 10" not in text
    for number in (8, 9):
        sequence = reader.order.sequence(number)
        assert f"sequence {number}: source {sequence.source}, domain domain_{sequence.source}" in text
        for piece in sequence.pieces:
            last = piece.first_token + piece.num_tokens - 1
            assert (
                f"{sequence.source} document {piece.document}, tokens {piece.first_token} to {last} of"
                in text
            )
        first = reader.order.tokens(sequence)[: sequence.pieces[0].num_tokens]
        assert reader.order.tokenizer.decode(first) in text


def test_show_batch_prints_the_step_of_a_configuration(mixture, monkeypatch, capsys):
    config = mixture()
    config.optim.global_batch_sequences = 4
    asked = []

    def composed(overrides, recipes_dir):
        asked.append((overrides, recipes_dir))
        return config

    monkeypatch.setattr(commands, "_composed", composed)
    monkeypatch.setattr(commands, "_install_shim", lambda: None)
    assert commands.show_batch(["recipe=x", "step=2", "rows=1", "run.seed=3"]) == 0
    assert asked == [(["recipe=x", "run.seed=3"], None)]
    printed = capsys.readouterr().out
    assert "step 2: sequences 4 to 7" in printed
    assert "sequence 4:" in printed
    assert "sequence 5:" not in printed


@pytest.mark.parametrize("argument", ["step=0", "step=-1", "step=x", "step=", "rows=0"])
def test_a_step_or_number_of_rows_that_is_none_is_refused(argument):
    with pytest.raises(ConfigError, match=f"{argument}: .* must be a whole number from 1"):
        commands.show_batch(["recipe=x", argument])


def test_show_batch_without_a_step_says_what_it_needs():
    with pytest.raises(ConfigError, match="needs step=N"):
        commands.show_batch(["recipe=x"])


def test_a_manifest_is_readable_json(tmp_path, make_set):
    prefix = make_set(tmp_path / "set", ["x"])
    assert json.loads(prefix.with_name("set.json").read_text())["format_version"] == 1
