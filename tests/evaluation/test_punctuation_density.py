import json

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from phsa_megatron import cli
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch
from phsa_megatron.evaluation.punctuation_density import densities, main


@pytest.fixture
def tokenizer_file(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_density_and_silent_blocks_are_counted_by_document(tokenizer_file, tmp_path):
    backend = Tokenizer.from_file(str(tokenizer_file))
    decoded = backend.decode_batch([[i] for i in range(256)])
    table = PunctuationTable.build(decoded, PunctuationMatch.exact, PunctuationLanguage.en)
    text = tmp_path / "text.jsonl"
    # Blocks of 4: "ab.c", "dddd", (ee); then "....", and nothing of the last two bytes.
    text.write_text("\n".join(json.dumps({"text": t}) for t in ("ab.cddddee", "....gg")))
    (found,) = densities(text, backend, [table], 4)
    assert (found.num_tokens, found.num_marks, found.num_blocks, found.num_silent) == (16, 5, 3, 1)
    assert (found.density_frac, found.silent_frac) == (5 / 16, 1 / 3)
    whole = tmp_path / "text.md"
    whole.write_text("ab.cddddee")
    (found,) = densities(whole, backend, [table], 4)
    assert (found.num_tokens, found.num_silent) == (10, 1)


def test_the_command_prints_sets_and_densities_and_draws(tokenizer_file, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("Here. There, and more!\n")
    plot, numbers = tmp_path / "p" / "density.png", tmp_path / "n.json"
    arguments = [f"tokenizer={tokenizer_file}", "language=en", "--text", str(text), "--plot", str(plot)]
    assert main([*arguments, "--json", str(numbers), "--block-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert "exact-en: 32 of 256 ids" in out and "sepllm: " in out and "strip_any-en" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    records = {r["table"]: r for r in json.loads(numbers.read_text())}
    assert records["exact-en"]["num_marks"] == 3 and records["exact-en"]["num_tokens"] > 20
    assert "exact-en-shuffled-0" in records


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokeniser=x"], "Did you mean tokenizer"),
        (["match=exact"], "tokenizer=FILE is missing"),
        (["tokenizer=/nowhere.json"], "does not exist"),
        (["tokenizer=x", "match=exactly"], "match=exactly: expected one of exact, exact_any, strip_any"),
    ],
)
def test_wrong_arguments_are_answered(arguments, words, capsys):
    assert cli.main(["punctuation", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_text_and_a_plot_of_nothing_are_refused(tokenizer_file, capsys):
    assert cli.main(["punctuation", f"tokenizer={tokenizer_file}", "--text", "/no.txt"]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert cli.main(["punctuation", f"tokenizer={tokenizer_file}", "--plot", "x.png"]) == 2
    assert "nothing to plot" in capsys.readouterr().err
