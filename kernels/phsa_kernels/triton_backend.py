"""What `impl='triton'` serves: checks, then the operators. All else is refused, never replaced."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from phsa_kernels import ops
from phsa_kernels.attend.forward import forward_kernel
from phsa_kernels.checks import VECTORS

HEAD_DIMS = (16, 32, 64, 128)
BLOCKS = (16, 32, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCORES = ("dot", "max_of_two")
MAX_GROUP = 16
MAX_TOPK = 64
INTERPRETED = not isinstance(forward_kernel, JITFunction)


def supported(ok: bool, what: str, served: str) -> None:
    """Refuse by name what no kernel serves."""
    if not ok:
        raise NotImplementedError(f"{what}: impl='triton' supports {served}")


def check(x: Tensor, block_tokens: int) -> None:
    """Refuse a device, dtype, head dim or block that no kernel serves."""
    supported(
        x.is_cuda or (INTERPRETED and x.device.type == "cpu"),
        f"tensors on {x.device.type}",
        "CUDA devices (and the CPU through Triton's interpreter, if TRITON_INTERPRET=1 is set at import)",
    )
    supported(x.dtype in DTYPES, f"dtype {x.dtype}", ", ".join(str(dtype) for dtype in DTYPES))
    supported(x.shape[2] in HEAD_DIMS, f"head dim {x.shape[2]}", f"head dims {HEAD_DIMS}")
    supported(block_tokens in BLOCKS, f"block_tokens={block_tokens}", f"block_tokens in {BLOCKS}")


def check_group(q: Tensor, num_kv_heads: int) -> None:
    """Refuse more query heads a key-value head than a tile holds."""
    group = q.shape[1] // num_kv_heads
    supported(group <= MAX_GROUP, f"{group} query heads a key-value head", f"1 to {MAX_GROUP}")


def check_scale(softmax_scale: float) -> None:
    """Refuse scales that turn a maximum into a minimum."""
    supported(softmax_scale > 0, f"softmax_scale={softmax_scale}", "scales above 0")


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def pool(k: Tensor, weights: Tensor | None, cu_seqlens: Tensor, *, block_tokens: int, kind: str) -> Tensor:
    """Return the pooled keys; see `phsa_kernels.api.pool`. No gradient: selection passes none."""
    supported(kind in VECTORS, f"kind={kind!r}", f"kinds {', '.join(VECTORS)}")
    check(k, block_tokens)
    if weights is not None:
        weights = weights.detach().contiguous()
    pooled: Tensor = ops.pool(_rows_contiguous(k.detach()), weights, cu_seqlens, block_tokens, VECTORS[kind])
    return pooled


def select(
    q: Tensor,
    pooled: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_blocks: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    group_score: str,
    score: str,
    softmax_scale: float,
) -> Tensor:
    """Return the chosen blocks; see `phsa_kernels.api.select`."""
    supported(score in SCORES, f"score={score!r}", f"scores {', '.join(SCORES)}")
    supported(
        group_score in {"softmax_sum", "raw_sum"}, f"group_score={group_score!r}", "softmax_sum and raw_sum"
    )
    supported(topk <= MAX_TOPK, f"topk={topk}", f"topk up to {MAX_TOPK}")
    check(q, block_tokens)
    supported(pooled.dtype == q.dtype, f"q {q.dtype} with pooled keys {pooled.dtype}", "one dtype")
    check_group(q, pooled.shape[1])
    check_scale(softmax_scale)
    ids: Tensor = ops.select(
        _rows_contiguous(q.detach()),
        _rows_contiguous(pooled.detach()),
        q_pos.contiguous(),
        q_doc.contiguous(),
        cu_blocks.contiguous(),
        topk,
        init_tokens,
        local_tokens,
        block_tokens,
        group_score == "softmax_sum",
        softmax_scale,
    )
    return ids


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids: Tensor,
    q_pos: Tensor,
    q_doc: Tensor,
    cu_seqlens: Tensor,
    block_slot: Tensor | None,
    *,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    dense_len_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see `phsa_kernels.api.attend`. A query's ids must be ascending, as from `select`."""
    check(k, block_tokens)
    supported(q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "one dtype")
    check_group(q, k.shape[1])
    check_scale(softmax_scale)
    supported(ids.shape[1] == k.shape[1], f"ids of {ids.shape[1]} heads", "ids by key-value head")
    supported(ids.shape[2] <= MAX_TOPK, f"{ids.shape[2]} ids a query", f"up to {MAX_TOPK}")
    out, lse, _, _ = ops.attend(
        _rows_contiguous(q),
        _rows_contiguous(k),
        _rows_contiguous(v),
        ids.contiguous(),
        q_pos.contiguous(),
        q_doc.contiguous(),
        cu_seqlens.contiguous(),
        init_tokens,
        local_tokens,
        block_tokens,
        dense_len_tokens,
        softmax_scale,
        None if block_slot is None else block_slot.contiguous(),
    )
    return out, lse
