"""Whether the blocks of the needles' digits have punctuation: from texts and tokenizer, without a model."""

from __future__ import annotations

import argparse
import hashlib
import json

import torch
from tokenizers import Tokenizer

from phsa_megatron.attention.punctuation import table_of
from phsa_megatron.data.tokenizer import Tokenizer as RunTokenizer
from phsa_megatron.evaluation.needle_study import WINDOWS
from phsa_megatron.evaluation.needles import NUM_DIGITS, Needle, make_needle
from phsa_megatron.evaluation.probe_attention import settings_of
from phsa_megatron.evaluation.study_texts import TEXTS, text_of


def digit_blocks(needle: Needle, block_tokens: int) -> range:
    """Return the blocks of the prompt that hold the needle's digits."""
    first = next(i for i in range(len(needle.prefix)) if needle.prefix[i : i + NUM_DIGITS] == needle.digits)
    return range(first // block_tokens, (first + NUM_DIGITS - 1) // block_tokens + 1)


def run_blocks(arguments: argparse.Namespace) -> None:
    """Write OUT/blocks.json: punctuation in the blocks of each text, and in those of each trial's digits."""
    file = arguments.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    decoded = RunTokenizer.from_file(file, "<|endoftext|>").decoded_tokens()
    records = []
    for text in arguments.texts:
        settings = settings_of("phsa", *WINDOWS, language=TEXTS[text][0])
        is_punctuation, m = table_of(decoded, settings).is_punctuation, settings.block_tokens
        content = text_of(text, arguments.essays_dir)
        ids = tokenizer.encode(content, add_special_tokens=False).ids
        counts = is_punctuation[torch.tensor(ids[: len(ids) // m * m])].view(-1, m).sum(1)
        for num_tokens in arguments.tokens:
            shares = []
            for trial in range(arguments.trials):
                needle = make_needle(tokenizer, ids, num_tokens, trial)
                flags = is_punctuation[torch.tensor(needle.prefix + needle.question)]
                blocks = digit_blocks(needle, m)
                shares.append(sum(bool(flags[b * m : (b + 1) * m].any()) for b in blocks) / len(blocks))
            records.append(
                {
                    "text": text,
                    "text_sha256": hashlib.sha256(content.encode()).hexdigest()[:12],
                    "num_tokens": num_tokens,
                    "blocks_with_punctuation_frac": float((counts > 0).float().mean()),
                    "punctuation_per_block": float(counts.float().mean()),
                    "digit_blocks_with_punctuation_frac": shares,
                }
            )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "blocks.json"
    path.write_text(json.dumps(records) + "\n", encoding="utf-8")
    print(f"written: {path}")
