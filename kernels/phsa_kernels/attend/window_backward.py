"""dK and dV of the windows: key tiles loop over the rows whose local window or init window reaches them.

Init keys are seen by every later query of their document. So that no program walks a long document alone,
rows are cut into chunks: a key tile takes the rows of the chunk in which its document starts,
`init_partial_kernel` takes every later chunk (at most one document of it started before it) and leaves
fp32 partial sums, and the key tile adds them in order.
"""

# Arguments of Triton functions are pointers, blocks and scalars of no Python type.
# ruff: noqa: ANN001, ANN201
# mypy: disallow-untyped-defs=false, disallow-untyped-decorators=false
# mypy: disallow-untyped-calls=false, disallow-incomplete-defs=false

from __future__ import annotations

import triton
import triton.language as tl

from phsa_kernels.attend.backward import key_gradients
from phsa_kernels.attend.slots import load_keys
from phsa_kernels.primitives import LOG2_E, row_offset


@triton.jit
def init_partial_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE,
    DELTA,
    PARTIAL_DK,
    PARTIAL_DV,
    ORDER,
    DOC,
    INIT_END,
    CU_SEQLENS,
    DOC_ROWS,
    KEY_ROWS,
    num_rows,
    num_heads,
    num_kv_heads,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    INIT: tl.constexpr,
    INIT_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """PARTIAL [chunks, Hkv, INIT_PADDED, D]: the chunk's share for the document that began before it."""
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    doc = tl.load(DOC + chunk * CHUNK)
    key = tl.load(CU_SEQLENS + doc) + n
    key_ok = key < tl.load(CU_SEQLENS + doc + 1)
    k, v = load_keys(K, V, KEY_ROWS, key, key_ok, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    m = tl.arange(0, T * GROUP_PADDED)
    r = m % GROUP_PADDED
    end = tl.minimum(tl.minimum(chunk * CHUNK + CHUNK, num_rows), tl.load(DOC_ROWS + doc + 1))
    end = tl.where(tl.load(DOC_ROWS + doc) < chunk * CHUNK, end, 0)
    scale_log2 = scale * LOG2_E
    # Windows grow with the row: if the first row sees the whole init window, so do all. (Keys of the padding
    # then gather sums that nobody reads.)
    masked_end = tl.where(tl.load(INIT_END + chunk * CHUNK) < tl.load(CU_SEQLENS + doc) + INIT, end, 0)
    for top in range(chunk * CHUNK, masked_end, T):
        i = top + m // GROUP_PADDED
        ok = (i < end) & (r < GROUP)
        query = tl.load(ORDER + i, mask=ok, other=0)
        init_end = tl.load(INIT_END + i, mask=ok, other=0)
        seen = key[:, None] < init_end[None, :]
        dk, dv = key_gradients(
            dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, kv_head * GROUP + r, ok, seen, num_heads,
            stride_qt, stride_qh, stride_gt, stride_gh, scale_log2, D, True,
        )  # fmt: skip
    for top in range(tl.maximum(chunk * CHUNK, masked_end), end, T):
        i = top + m // GROUP_PADDED
        ok = (i < end) & (r < GROUP)
        query = tl.load(ORDER + i, mask=ok, other=0)
        dk, dv = key_gradients(
            dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, kv_head * GROUP + r, ok, ok[None, :], num_heads,
            stride_qt, stride_qh, stride_gt, stride_gh, scale_log2, D, False,
        )  # fmt: skip
    base = (chunk.to(tl.int64) * num_kv_heads + kv_head) * (INIT_PADDED * D)
    at = base + n[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(PARTIAL_DK + at, dk)
    tl.store(PARTIAL_DV + at, dv)


@triton.jit
def window_dkdv_kernel(
    Q,
    K,
    V,
    GRAD_OUT,
    LSE,
    DELTA,
    DK,
    DV,
    PARTIAL_DK,
    PARTIAL_DV,
    ORDER,
    START,
    INIT_END,
    LOCAL_START,
    POSITION,
    CU_SEQLENS,
    DOC_ROWS,
    TILE_DOCS,
    TILE_ROWS,
    KEY_ROWS,
    num_keys,
    num_tiles,
    num_heads,
    num_kv_heads,
    scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    INIT: tl.constexpr,
    INIT_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
    BN: tl.constexpr,
):
    """DK, DV (contiguous [Tk, Hkv, D]) of a key tile; TILE_ROWS, TILE_DOCS, DOC_ROWS: see `KeyTiles`."""
    # Heads change fastest: the tiles with a document's init keys, the longest, start first in every head.
    tile = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    key = tile * BN + tl.arange(0, BN)
    key_ok = key < num_keys
    row_of_key = key
    if KEY_ROWS is not None:  # dk and dv lie as k and v do
        row_of_key = tl.load(KEY_ROWS + key, mask=key_ok, other=-1)
        key_ok = row_of_key >= 0
    k, v = load_keys(K, V, None, row_of_key, key_ok, kv_head, stride_kt, stride_kh, stride_vt, stride_vh, D)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    m = tl.arange(0, T * GROUP_PADDED)
    r = m % GROUP_PADDED
    head = kv_head * GROUP + r
    scale_log2 = scale * LOG2_E
    first, end = tl.load(TILE_ROWS + tile), tl.load(TILE_ROWS + num_tiles + tile)
    # Whole steps of rows that see every key of the tile need no mask.
    inner = tl.minimum(tl.maximum(tl.load(TILE_ROWS + 2 * num_tiles + tile), first), end)
    inner_end = inner + tl.maximum(tl.load(TILE_ROWS + 3 * num_tiles + tile) - inner, 0) // T * T
    head_steps = tl.cdiv(inner - first, T)
    for step in range(head_steps + tl.cdiv(end - inner_end, T)):
        at_head = step < head_steps
        top = tl.where(at_head, first + step * T, inner_end + (step - head_steps) * T)
        i = top + m // GROUP_PADDED
        ok = (i < tl.where(at_head, inner, end)) & (r < GROUP)
        query = tl.load(ORDER + i, mask=ok, other=0)
        local_start = tl.load(LOCAL_START + i, mask=ok, other=0)
        position = tl.load(POSITION + i, mask=ok, other=-1)
        seen = (key[:, None] >= local_start[None, :]) & (key[:, None] <= position[None, :])
        dk, dv = key_gradients(
            dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, head, ok, seen, num_heads, stride_qt, stride_qh,
            stride_gt, stride_gh, scale_log2, D, True,
        )  # fmt: skip
    for top in range(inner, inner_end, T):
        query = tl.load(ORDER + top + m // GROUP_PADDED)
        dk, dv = key_gradients(
            dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, head, r < GROUP, key_ok[:, None], num_heads,
            stride_qt, stride_qh, stride_gt, stride_gh, scale_log2, D, False,
        )  # fmt: skip
    if INIT > 0:
        for doc in range(tl.load(TILE_DOCS + tile), tl.load(TILE_DOCS + num_tiles + tile) + 1):
            begin = tl.load(CU_SEQLENS + doc)
            row = tl.load(DOC_ROWS + doc)
            # A document whose init keys all lie before this tile has nothing to add.
            rows_end = tl.where(begin + INIT > tile * BN, tl.load(DOC_ROWS + doc + 1), row)
            end = tl.minimum(rows_end, row // CHUNK * CHUNK + CHUNK)
            for top in range(row, end, T):
                i = top + m // GROUP_PADDED
                ok = (i < end) & (r < GROUP)
                query = tl.load(ORDER + i, mask=ok, other=0)
                start = tl.load(START + i, mask=ok, other=0)
                init_end = tl.load(INIT_END + i, mask=ok, other=0)
                seen = (key[:, None] >= start[None, :]) & (key[:, None] < init_end[None, :])
                dk, dv = key_gradients(
                    dk, dv, k, v, Q, GRAD_OUT, LSE, DELTA, query, head, ok, seen, num_heads, stride_qt,
                    stride_qh, stride_gt, stride_gh, scale_log2, D, True,
                )  # fmt: skip
            n = key - begin
            mine = (n >= 0) & (n < INIT) & (key < tl.load(CU_SEQLENS + doc + 1))
            for chunk in range(row // CHUNK + 1, (rows_end + CHUNK - 1) // CHUNK):
                base = (kv_head.to(tl.int64) + chunk * num_kv_heads) * (INIT_PADDED * D)
                at = base + n[:, None] * D + tl.arange(0, D)[None, :]
                dk += tl.load(PARTIAL_DK + at, mask=mine[:, None], other=0.0)
                dv += tl.load(PARTIAL_DV + at, mask=mine[:, None], other=0.0)
    out = row_offset(row_of_key, kv_head, num_kv_heads * D, D)[:, None] + tl.arange(0, D)[None, :]
    tl.store(DK + out, (dk * scale).to(DK.dtype.element_ty), mask=key_ok[:, None])
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=key_ok[:, None])
