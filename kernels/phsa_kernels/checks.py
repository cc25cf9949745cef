"""What every op of the door checks about its arguments, whatever implementation will run."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

IMPLS = ("reference", "triton")
VECTORS = {"mean": 1, "halves": 2}
"""Kinds of pooled keys that all implementations have, and how many vectors a block has."""


def implementation(
    impl: str, reference: str = "phsa_kernels.reference", kernels: str = "phsa_kernels.triton_backend"
) -> ModuleType:
    """Return the module that has the ops of an implementation.

    Args:
        impl: one of IMPLS.
        reference: name of the module of impl='reference'.
        kernels: name of the module of impl='triton'.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: Triton is asked for and not installed.
    """
    require(impl in IMPLS, f"impl={impl!r} is unknown; use one of {', '.join(IMPLS)}")
    if impl == "reference":
        return importlib.import_module(reference)
    try:
        return importlib.import_module(kernels)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise NotImplementedError("impl='triton' needs the package triton, which is not installed") from error


def require(ok: bool, message: str) -> None:
    """Raise ValueError with the message unless `ok`."""
    if not ok:
        raise ValueError(message)


def check_windows(block_tokens: int, init_tokens: int, local_tokens: int) -> None:
    """Refuse windows that are not whole blocks."""
    require(block_tokens >= 1, f"block_tokens={block_tokens} must be at least 1")
    require(
        init_tokens >= 0 and init_tokens % block_tokens == 0,
        f"init_tokens={init_tokens} must be a multiple of block_tokens={block_tokens}, or 0",
    )
    require(
        local_tokens >= block_tokens and local_tokens % block_tokens == 0,
        f"local_tokens={local_tokens} must be a positive multiple of block_tokens={block_tokens}: "
        "the current block is always attended to",
    )


def check_heads(q: Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Refuse queries [Tq, Hq, D] that do not fit the keys' heads."""
    require(q.dim() == 3, f"q must be [Tq, Hq, D], got {tuple(q.shape)}")
    require(q.shape[2] == head_dim, f"q has head dim {q.shape[2]}, keys have {head_dim}")
    require(
        num_kv_heads > 0 and q.shape[1] % num_kv_heads == 0,
        f"{q.shape[1]} query heads do not divide among {num_kv_heads} key-value heads",
    )


def check_index(name: str, tensor: Tensor, length: int | None = None) -> None:
    """Refuse index tensors that are not one-dimensional int32 of the expected length."""
    require(
        tensor.dim() == 1 and tensor.dtype == torch.int32,
        f"{name} must be a 1-D int32 tensor, got {tuple(tensor.shape)} {tensor.dtype}",
    )
    if length is not None:
        require(len(tensor) == length, f"{name} has {len(tensor)} entries, expected {length}")
