"""The other selectors against plain loops in fp64, a tiny case by hand, and causality and refusals."""

import math

import pytest
import torch

from phsa_kernels import api, selectors

M = 16


def make(lengths, heads=(4, 2), head_dim=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, h, head_dim, dtype=torch.float64, generator=g)
        for h in (heads[0], heads[1], heads[1])
    )
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    marks = torch.rand(total, generator=g) < 0.1
    return q, k, v, cu, marks


def block_weights(marks, cu, m, lam=0.5):
    """Loop writing of the pooling weights."""
    w = torch.zeros(len(marks))
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for b in range(start, end, m):
            n, c = min(m, end - b), int(marks[b : min(b + m, end)].sum())
            for t in range(b, b + n):
                w[t] = lam / n + (1 - lam) * float(marks[t]) / c if c else 1 / n
    return w


def loop_score(kind, q, block, w, marks, lam, scale):
    """s of one query [D] and one block [m][D], channel by channel."""
    m, dim = len(block), len(q)
    dot = lambda x: sum(q[d] * x[d] for d in range(dim))  # noqa: E731
    if kind == "moba":
        return dot([sum(x[d] for x in block) / m for d in range(dim)])
    if kind == "halves":
        means = []
        for part in (range(m // 2), range(m // 2, m)):
            total = sum(w[t] for t in part)
            means.append([sum(w[t] * block[t][d] for t in part) / total for d in range(dim)])
        return scale * max(dot(x) for x in means)
    if kind == "cumulant":
        mean = [sum(w[t] * block[t][d] for t in range(m)) for d in range(dim)]
        var = [sum(w[t] * (block[t][d] - mean[d]) ** 2 for t in range(m)) for d in range(dim)]
        return scale * dot(mean) + scale**2 / 2 * sum(q[d] ** 2 * var[d] for d in range(dim))
    score = 0.0
    for d in range(dim):
        low, high = min(x[d] for x in block), max(x[d] for x in block)
        flagged = [x[d] for x, mark in zip(block, marks, strict=True) if mark]
        if flagged:
            low, high = (lam * a + (1 - lam) * f(flagged) for a, f in ((low, min), (high, max)))
        score += scale * max(q[d] * low, q[d] * high)
    return score


def loop_infllm(queries, keys, i, m, scale, coarse):
    """Block scores of one query position of one group: queries [R][D], keys [n][D]."""
    n, dim = len(keys), len(keys[0])

    def window_dots(q, length, stride):
        dots = {}
        for j in range(0, (n - length) // stride + 1 if n >= length else 0):
            if j * stride + length - 1 <= i:
                mean = [
                    sum(keys[t][d] for t in range(j * stride, j * stride + length)) / length
                    for d in range(dim)
                ]
                dots[j] = scale * sum(q[d] * mean[d] for d in range(dim))
        return dots

    shared = {}
    for q in queries:
        fine = window_dots(q, 32, 16)
        rough = window_dots(q, 128, 64) if coarse else {}
        normalizer = sum(math.exp(x) for x in (rough or fine).values())
        for j, x in fine.items():
            shared[j] = shared.get(j, 0.0) + math.exp(x) / normalizer
    scores = []
    for b in range(n // m):
        overlap = [p for j, p in shared.items() if j * 16 < (b + 1) * m and j * 16 + 32 > b * m]
        scores.append(max(overlap, default=0.0))
    return scores


def loop_select(kind, q, k, cu, marks, weights, *, m, init, local, topk, group_score, lam, coarse):
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    rows = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for i in range(end - start):
            row, cur = [], i // m
            heads = [[h] for h in range(q.shape[1])]
            if kind != "moba":
                heads = [list(range(g * group, (g + 1) * group)) for g in range(k.shape[1])]
            for members in heads:
                kv = members[0] // group
                if kind == "infllm_v2":
                    queries = [q[start + i, h].tolist() for h in members]
                    total = loop_infllm(queries, k[start:end, kv].tolist(), i, m, scale, coarse)
                else:
                    total = [0.0] * cur
                    for h in members:
                        s = []
                        for b in range(cur):
                            at = slice(start + b * m, start + (b + 1) * m)
                            flags = [False] * m if marks is None else marks[at].tolist()
                            w = [1 / m] * m if weights is None else weights[at].tolist()
                            s.append(
                                loop_score(
                                    kind, q[start + i, h].tolist(), k[at, kv].tolist(), w, flags, lam, scale
                                )
                            )
                        if kind != "moba" and group_score == "softmax_sum" and s:
                            z = sum(math.exp(x) for x in s)
                            s = [math.exp(x) / z for x in s]
                        total = [a + b for a, b in zip(total, s, strict=True)]
                candidates = range(init // m, cur - local // m + 1)
                best = sorted(sorted(candidates, key=lambda b: (-total[b], b))[:topk])
                row.append(best + [-1] * (topk - len(best)))
            rows.append(row)
    return rows


@pytest.mark.parametrize("joined", [False, True], ids=["plain", "with punctuation"])
@pytest.mark.parametrize("group_score", ["softmax_sum", "raw_sum"])
@pytest.mark.parametrize("kind", ["cumulant", "minmax", "halves", "moba"])
def test_ids_equal_plain_loops(kind, group_score, joined):
    q, k, _, cu, marks = make([49, 0, 7, 26])
    m = 4
    weights = block_weights(marks, cu, m) if joined else None
    setting = {"topk": 2, "group_score": group_score}
    ids = run(
        kind, q, k, cu, m=m, init=m, local=2 * m, weights=weights, marks=marks if joined else None, **setting
    )
    expected = loop_select(
        kind,
        q,
        k,
        cu,
        marks if joined else None,
        weights,
        m=m,
        init=m,
        local=2 * m,
        lam=0.5,
        coarse=False,
        **setting,
    )
    assert ids.tolist() == expected
    assert (ids >= 0).any()


@pytest.mark.parametrize("coarse", [False, True], ids=["exact normalizer", "coarse normalizer"])
@pytest.mark.parametrize("m", [16, 64])
def test_infllm_v2_ids_equal_plain_loops(m, coarse):
    q, k, _, cu, _ = make([37, 330], heads=(2, 1), head_dim=3)
    q = q * 3
    ids = run("infllm_v2", q, k, cu, m=m, init=0, local=m, topk=2, coarse_lse=coarse)
    sample = range(37, 367, 9)
    expected = loop_select(
        "infllm_v2",
        q,
        k,
        cu,
        None,
        None,
        m=m,
        init=0,
        local=m,
        topk=2,
        group_score="",
        lam=0.5,
        coarse=coarse,
    )
    assert [ids[i].tolist() for i in sample] == [expected[i] for i in sample]


def run(kind, q, k, cu, *, m, init, local, topk, **options):
    position, doc = api.token_positions(cu, len(k))
    if kind == "halves":
        weights, group_score = options.get("weights"), options.get("group_score", "softmax_sum")
        pooled = api.pool(k, weights, cu, block_tokens=m, kind="halves")
        windows = {"init_tokens": init, "local_tokens": local, "block_tokens": m, "topk": topk}
        how = {"group_score": group_score, "score": "max_of_two"}
        return api.select(q, pooled, position, doc, api.block_boundaries(cu, m), **windows, **how)
    return selectors.select_blocks(
        q,
        k,
        position,
        doc,
        cu,
        kind=kind,
        topk=topk,
        init_tokens=init,
        local_tokens=local,
        block_tokens=m,
        **options,
    )


def test_infllm_v2_by_hand():
    """One head, one channel, 64 keys: 16 zeros, 16 of log 4, 32 zeros. Windows: log 2, log 2, 0.

    At the last query softmax is 2/5, 2/5, 1/5. Blocks of 16 take: [2/5], [2/5, 2/5], [2/5, 1/5], [1/5].
    """
    keys = torch.zeros(64, 1, 1, dtype=torch.float64)
    keys[16:32] = math.log(4.0)
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scores = selectors.infllm_v2_scores(q, keys, torch.tensor([63]), 16, 1.0, False)
    torch.testing.assert_close(scores.flatten().tolist(), [0.4, 0.4, 0.4, 0.2])
    # At position 46 only the first window is complete: it holds everything, and blocks past it nothing.
    scores = selectors.infllm_v2_scores(q, keys, torch.tensor([46]), 16, 1.0, False)
    torch.testing.assert_close(scores.flatten().tolist(), [1.0, 1.0, 0.0, 0.0])
    # One block of 64 takes the best of its windows.
    scores = selectors.infllm_v2_scores(q, keys, torch.tensor([63]), 64, 1.0, False)
    torch.testing.assert_close(scores.flatten().tolist(), [0.4])


@pytest.mark.parametrize("kind", [*selectors.KINDS, "halves"])
def test_attention_gradients_pass_through_the_chosen_blocks_only(kind):
    q, k, v, cu, _ = make([80], heads=(2, 1), head_dim=2)
    ids = run(kind, q, k, cu, m=M, init=0, local=M, topk=1)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    position, doc = api.token_positions(cu, 80)
    out, _ = api.attend(q, k, v, ids, position, doc, cu, init_tokens=0, local_tokens=M, block_tokens=M)
    expected = []
    for i in range(80):
        for h in range(2):
            chosen = ids[i, h if kind == "moba" else 0].tolist()
            keys = [t for t in range(i + 1) if t // M in chosen or t // M == i // M]
            p = (k[keys, 0] @ q[i, h] / math.sqrt(2)).softmax(0)
            expected.append(p @ v[keys, 0])
    expected = torch.stack(expected).view(80, 2, 2)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(80, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad((out * upstream).sum(), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad((expected * upstream).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [*selectors.KINDS, "halves"])
def test_future_keys_change_no_earlier_choice(kind):
    q, k, _, cu, _ = make([200])
    before = run(kind, q, k, cu, m=M, init=M, local=M, topk=2)
    k[120:] *= 50
    after = run(kind, q, k, cu, m=M, init=M, local=M, topk=2)
    assert torch.equal(before[:120], after[:120])
    assert not torch.equal(before, after)


def test_max_norm_flags_equal_plain_loops():
    _, k, _, cu, _ = make([37, 5, 16])
    k[17] = k[16]  # equal norms: the first
    k[16:18] *= 100
    position, _ = api.token_positions(cu, len(k))
    flags = selectors.max_norm_flags(k, position, cu, M)
    expected = torch.zeros_like(flags)
    for start in (0, 16, 42):
        for h in range(2):
            norms = [float(k[t, h] @ k[t, h]) for t in range(start, start + M)]
            expected[start + norms.index(max(norms)), h] = True
    assert torch.equal(flags, expected)


def test_other_implementations_and_odd_sizes_are_refused():
    q, k, _, cu, _ = make([40])
    with pytest.raises(NotImplementedError, match="impl='reference' only"):
        run("minmax", q, k, cu, m=M, init=0, local=M, topk=1, impl="triton")
    with pytest.raises(ValueError, match="stride 16"):
        run("infllm_v2", q, k, cu, m=8, init=0, local=8, topk=1)
    with pytest.raises(ValueError, match="even"):
        run("halves", q, k, cu, m=5, init=0, local=5, topk=1)
    with pytest.raises(ValueError, match="unknown"):
        run("quest", q, k, cu, m=M, init=0, local=M, topk=1)
