"""phsa-megatron: pretraining on megatron-core with punctuation-aware hybrid sparse attention."""

__version__ = "0.1.0"
