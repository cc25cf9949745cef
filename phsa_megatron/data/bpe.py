"""Train a small byte-level BPE on a corpus of one's own.

On a CPU the output layer of a 151,669-token vocabulary costs more than the rest of a small model, so the demo
trains its own vocabulary. It splits and normalizes text as Qwen does, so that what is measured about
punctuation carries over.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.qwen_tokenizer import configure

NUM_BYTES = 256


def train_bpe(texts: Iterable[str], vocab_size: int, eod_token: str = "<|endoftext|>") -> Tokenizer:
    """Return a byte-level BPE trained on texts; the same texts in the same order give the same tokenizer.

    Args:
        texts: documents. All of their words are counted in memory.
        vocab_size: tokens in all: the end-of-document token (id 0), 256 bytes, and merges.
        eod_token: the one special token.

    Raises:
        DataError: `vocab_size` leaves no room for merges, or the texts are too few to reach it.
    """
    minimum = NUM_BYTES + 2
    if vocab_size < minimum:
        raise DataError(
            f"vocab_size={vocab_size} leaves no room for a merge: 256 bytes, {eod_token} and at least one "
            f"merge need {minimum}."
        )
    tokenizer = Tokenizer(BPE(fuse_unk=False, byte_fallback=False))
    configure(tokenizer)
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[eod_token],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != vocab_size:
        raise DataError(
            f"the texts only give {reached} tokens of the {vocab_size} asked for: no further pair occurs "
            f"twice. Give more text or ask for at most {reached} tokens."
        )
    return tokenizer
