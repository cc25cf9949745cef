"""What `impl='triton'` serves of the ops of generation: checks, then the operators. All else is refused."""

from __future__ import annotations

from torch import Tensor

from phsa_kernels.decode import launch
from phsa_kernels.triton_backend import MAX_TOPK, check, check_group, check_scale, supported


def _rows_contiguous(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        supported(
            x.stride(-1) == 1, f"{name} with strides {x.stride()}", "an innermost dimension of stride 1"
        )


def append_keys(
    k: Tensor,
    v: Tensor,
    marks: Tensor,
    lengths: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pooled_cache: Tensor,
    open_sums: Tensor,
    open_marks: Tensor,
    *,
    block_tokens: int,
    mean_weight_frac: float,
) -> None:
    """Append one token a sequence, in place; see `phsa_kernels.api.append_keys`."""
    check(k, block_tokens)
    _rows_contiguous(k=k, v=v, k_cache=k_cache, v_cache=v_cache, pooled_cache=pooled_cache)
    launch.append_keys(
        k.detach(),
        v.detach(),
        marks.contiguous(),
        lengths.contiguous(),
        k_cache,
        v_cache,
        pooled_cache,
        open_sums,
        open_marks,
        block_tokens,
        mean_weight_frac,
    )


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    pooled_cache: Tensor,
    lengths: Tensor,
    *,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    block_tokens: int,
    group_score: str,
    dense_len_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (out, lse, ids); see `phsa_kernels.api.decode_attention`."""
    check(q, block_tokens)
    check_group(q, k_cache.shape[2])
    check_scale(softmax_scale)
    supported(topk <= MAX_TOPK, f"topk={topk}", f"topk up to {MAX_TOPK}")
    _rows_contiguous(q=q, k_cache=k_cache, v_cache=v_cache, pooled_cache=pooled_cache)
    found: tuple[Tensor, Tensor, Tensor] = launch.decode_attention(
        q.detach(),
        k_cache,
        v_cache,
        pooled_cache,
        lengths.contiguous(),
        topk,
        init_tokens,
        local_tokens,
        block_tokens,
        group_score == "softmax_sum",
        dense_len_tokens,
        softmax_scale,
    )
    return found
