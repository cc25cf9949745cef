"""One tokenizer type for the whole project: a Hugging Face `tokenizer.json` and its end-of-document token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import pre_tokenizers

from phsa_megatron.config.errors import DataError


class Tokenizer:
    """Text to ids and back.

    Special tokens are never made from text: a document that contains the characters of the end-of-document
    token gets the ids of those characters, so that text cannot forge a document boundary. `eod_id` is
    appended by whoever ends a document.

    Attributes:
        path: the file.
        vocab_size: largest id + 1, added tokens included.
        eod_token: the token that ends every document.
        eod_id: its id.
        sha256: hex digest of the file's bytes.
    """

    def __init__(self, backend: HuggingFaceTokenizer, path: Path, eod_token: str, sha256: str) -> None:
        vocab = backend.get_vocab(with_added_tokens=True)
        if eod_token not in vocab:
            specials = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
            raise DataError(
                f"data.eod_token={eod_token!r} is not in the tokenizer {path}. Every document must end with "
                f"a token of the vocabulary. Special tokens of this file: "
                f"{', '.join(specials[:20]) or 'none'}."
            )
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self.path = path
        self.vocab_size = max(vocab.values()) + 1
        self.eod_token = eod_token
        self.eod_id = vocab[eod_token]
        self.sha256 = sha256

    @classmethod
    def from_file(cls, path: str | Path, eod_token: str) -> Tokenizer:
        """Return the tokenizer in a `tokenizer.json`.

        Args:
            path: a file in the format of Hugging Face `tokenizers`.
            eod_token: a token of its vocabulary.

        Raises:
            DataError: no such file, not a tokenizer, or no such token.
        """
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"data.tokenizer_file={path} does not exist. Give a Hugging Face tokenizer.json, or make "
                f"one: `phsa-train prepare-tokenizer qwen3 --output {path}`; `phsa-train prepare-demo` makes "
                f"the demo's."
            ) from None
        except OSError as error:
            raise DataError(f"data.tokenizer_file={path} cannot be read: {error.strerror}.") from error
        try:
            backend = HuggingFaceTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # tokenizers raises plain Exception for anything it cannot parse
            raise DataError(
                f"data.tokenizer_file={path} is not a Hugging Face tokenizer.json: {error}. A vocab.json, a "
                f"SentencePiece model or a tokenizer_config.json is another format."
            ) from error
        return cls(backend, path, eod_token, hashlib.sha256(content).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; no end-of-document token is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, encoded by the threads of `tokenizers`."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens spelled out; incomplete UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decoded_tokens(self) -> list[str]:
        """Return, for each id in `range(vocab_size)`, the string it decodes to when it stands alone.

        An id of a byte-level vocabulary that holds part of a character decodes to U+FFFD; an id that the
        vocabulary does not use decodes to the empty string.
        """
        ids = [[i] for i in range(self.vocab_size)]
        return self._backend.decode_batch(ids, skip_special_tokens=False)

    def token_num_bytes(self) -> np.ndarray:
        """Return how many UTF-8 bytes of text each id stands for: int64 [vocab_size].

        Special tokens, which no text contains, and unused ids have 0. The sum over an encoded text is the
        UTF-8 length of the text as the tokenizer normalizes it (Qwen's: NFC), which is what bits per byte
        divides by.

        Raises:
            DataError: the vocabulary is not byte-level, so that an id has no exact number of bytes.
        """
        added = self._backend.get_added_tokens_decoder()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        num_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token_id in added:
                num_bytes[token_id] = 0 if added[token_id].special else len(token.encode("utf-8"))
                continue
            if not alphabet.issuperset(token):
                raise DataError(
                    f"the tokenizer {self.path} is not a byte-level BPE: token {token_id} is {token!r}. Bits "
                    f"per byte needs the exact number of bytes of each token; use a byte-level tokenizer "
                    f"(the tokenizers of GPT-2, Llama 3 and Qwen are)."
                )
            # In a byte-level vocabulary each character of a token spells one byte.
            num_bytes[token_id] = len(token)
        return num_bytes
