"""PHSA inside megatron-core: punctuation, pooling weights, side information, core attention."""
