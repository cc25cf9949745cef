"""The least time of each stage on an H100: the largest of arithmetic, special functions and bytes."""

MATRIX_FLOP_PER_S = 798e12  # 8192^3 bf16 product, measured on this device
EXP_PER_S = 132 * 16 * 1.755e9  # 16 special-function lanes a multiprocessor
BYTES_PER_S = 3.0e12  # device-to-device copy, measured on this device


def mean_keys(seq_len, init, local, topk, block):
    """Mean attended keys a query of one document of seq_len tokens (closed form by blocks)."""
    total = 0
    for current in range(-(-seq_len // block)):
        tokens = min(block, seq_len - current * block)
        before = current * block
        windows = min(before, init + local - block)
        chosen = min(topk * block, max(0, before - init - local + block))
        total += tokens * (windows + chosen) + tokens * (tokens + 1) / 2
    return total / seq_len


def stage_ms(stage, backward, *, heads_q, heads_kv, head_dim, seq_len, init, local, topk, block, sweeps=2):
    """`sweeps`: over the pooled keys, 2 with a normalizer and 1 without."""
    kv_bytes = seq_len * heads_kv * head_dim * 2
    q_bytes = seq_len * heads_q * head_dim * 2
    if stage == "pool":
        return 1e3 * kv_bytes * (1 + 1 / block) / BYTES_PER_S
    if stage == "select":
        scores = heads_q * seq_len * (seq_len / block) / 2
        exps = scores / EXP_PER_S if sweeps == 2 else 0
        return 1e3 * sweeps * max(scores * 2 * head_dim / MATRIX_FLOP_PER_S, exps)
    if stage == "attend":
        pairs = heads_q * seq_len * mean_keys(seq_len, init, local, topk, block)
        flop, exps, moved = 4 * head_dim * pairs, pairs, 2 * q_bytes + 2 * kv_bytes
        if backward:
            flop, exps, moved = flop * 3.5, 2 * pairs, moved * 3
        return 1e3 * max(flop / MATRIX_FLOP_PER_S, exps / EXP_PER_S, moved / BYTES_PER_S)
    parts = ("pool", "select", "attend")
    shape = {"heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim, "seq_len": seq_len}
    window = {"init": init, "local": local, "topk": topk, "block": block, "sweeps": sweeps}
    return sum(stage_ms(part, backward, **shape, **window) for part in parts)
