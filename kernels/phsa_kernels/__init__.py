"""PHSA kernels: the ops of the method behind one public door, `phsa_kernels.api`."""

from phsa_kernels.api import (
    DecodeOutput,
    PHSAOutput,
    append_keys,
    attend,
    decode_attention,
    phsa_attention,
    pool,
    select,
)

__all__ = [
    "DecodeOutput",
    "PHSAOutput",
    "append_keys",
    "attend",
    "decode_attention",
    "phsa_attention",
    "pool",
    "select",
]
