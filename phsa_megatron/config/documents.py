"""How many documents a sequence has room for."""

from __future__ import annotations

from phsa_megatron.config.schema import DataConfig

DOCUMENT_TOKENS_PER_BOUNDARY = 16
"""`data.max_documents_per_sequence` is a sequence's tokens divided by this when nobody sets it."""


def documents_limit(data: DataConfig) -> int:
    """Return the fixed length of a sequence's boundary tensor; tokens of further documents become padding."""
    if data.max_documents_per_sequence is not None:
        return data.max_documents_per_sequence
    # One for the text and one for what does not fit and becomes padding.
    return max(2, data.seq_len_tokens // DOCUMENT_TOKENS_PER_BOUNDARY)
