"""NSA's compressed branch: against a loop over tokens in fp64, numbers computed by hand, and its edges."""

import math

import pytest
import torch

from phsa_kernels.api import token_positions
from phsa_kernels.nsa import Compression, compressed_attention, shared_strides, window_starts

D, HEADS, KV, WIDTH = 4, 4, 2, 3
BOUNDS = [0, 5, 5, 87, 118, 150, 150]
SETTINGS = {"topk": 2, "init_tokens": 16, "local_tokens": 16, "block_tokens": 16}


# Angles of RoPE that are those of no simple position, to tell the window's first token from the others.
ANGLES = torch.randn(BOUNDS[-1], D // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def _compression(generator):
    shapes = [(KV, 32, D), (KV, 32 * D, WIDTH), (KV, WIDTH, D)]
    return Compression(
        *(torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes)
    )


def _inputs(num_tokens=BOUNDS[-1], seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(num_tokens, h, D, dtype=torch.float64, generator=g, requires_grad=True)
        for h in (HEADS, KV, KV)
    )
    return q, k, v, _compression(g), _compression(g)


def _run(inputs, bounds=BOUNDS, **changes):
    q, k, v, of_keys, of_values = inputs
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    where = token_positions(cu_seqlens, len(q))
    settings = {**SETTINGS, "angles": torch.cat([ANGLES, ANGLES], 1)[: len(q)], **changes}
    return compressed_attention(q, k, v, of_keys, of_values, *where, cu_seqlens, **settings)


def _leaves(inputs):
    q, k, v, of_keys, of_values = inputs
    return [q, k, v, *of_keys, *of_values]


def _one_vector(tokens, head, weights):
    """Compress 32 rows [D] of one head, number by number."""
    hidden = []
    for e in range(WIDTH):
        total = 0.0
        for t, row in enumerate(tokens):
            for c in range(D):
                weight = weights.w_in[head, t * D + c, e]
                total = total + (row[c] + weights.position[head, t, c]) * weight
        hidden.append(total / (1 + torch.exp(-total)))
    return torch.stack([sum(hidden[e] * weights.w_out[head, e, c] for e in range(WIDTH)) for c in range(D)])


def _turned(vector, token):
    """Turn pairs of channels (c, c + D / 2), one by one."""
    parts = [None] * D
    for c, angle in enumerate(ANGLES[token].tolist()):
        x, y = vector[c], vector[c + D // 2]
        parts[c] = x * math.cos(angle) - y * math.sin(angle)
        parts[c + D // 2] = y * math.cos(angle) + x * math.sin(angle)
    return torch.stack(parts)


def _by_loops(inputs, bounds=BOUNDS, topk=2, init_tokens=16, local_tokens=16, block_tokens=16):
    """The branch query by query and window by window: equations 7 to 10 with tokens for strides."""
    q, k, v, of_keys, of_values = inputs
    m = block_tokens
    out, ids = torch.zeros_like(q), {}
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        spans = [(s, s + 32) for s in range(start, end - 31, 16)]
        keys, values = (
            [[_one_vector(x[a:b, head], head, w) for a, b in spans] for head in range(KV)]
            for x, w in ((k, of_keys), (v, of_values))
        )
        keys = [[_turned(key, a) for key, (a, _) in zip(of_head, spans, strict=True)] for of_head in keys]
        for i in range(start, end):
            seen = [n for n, (_, b) in enumerate(spans) if b - 1 <= i]
            for head in range(KV):
                scores = dict.fromkeys(range((end - start) // m), 0.0)
                for h in range(head * HEADS // KV, (head + 1) * HEADS // KV):
                    if not seen:
                        continue
                    powers = [torch.exp(q[i, h] @ keys[head][n] / math.sqrt(D)) for n in seen]
                    for n, power in zip(seen, powers, strict=True):
                        share = power / sum(powers)
                        out[i, h] = out[i, h] + share * values[head][n]
                        for b in scores:  # shared tokens over the stride
                            first, last = start + b * m, start + (b + 1) * m
                            shared = min(last, spans[n][1]) - max(first, spans[n][0])
                            scores[b] += max(0, shared) // 16 * share.item()
                current = (i - start) // m
                candidates = [b for b in scores if init_tokens // m <= b <= current - local_tokens // m]
                best = sorted(candidates, key=lambda b: (-scores[b], b))[:topk]
                ids[i, head] = sorted(best) + [-1] * (topk - len(best))
    return out, ids


@pytest.mark.parametrize(
    "changes", [{}, {"block_tokens": 32, "init_tokens": 0, "local_tokens": 32, "topk": 1}]
)
def test_output_gradients_and_blocks_are_those_of_loops_over_tokens(changes):
    # Documents of 5 (no window), 82, 31 (one token too short) and 32 tokens (one window, seen by the last).
    inputs = _inputs()
    found = _run(inputs, **changes)
    expected, ids = _by_loops(inputs, **changes)
    assert {key: found.ids[key].tolist() for key in ids} == ids
    assert sum(max(blocks) >= 0 for blocks in ids.values()) > 20
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found.out, expected, rtol=1e-12, atol=1e-13)
    gradients, wanted = (torch.autograd.grad(x, _leaves(inputs), upstream) for x in (found.out, expected))
    for one, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 0
        # Sums of at most 128 products in another order.
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11 * other.abs().max().item())
    shifted = torch.roll(expected, 1, 0)
    assert not torch.allclose(found.out, shifted, rtol=1e-3)


def test_numbers_by_hand():
    """One head of one channel, no RoPE, 48 tokens, MLPs that pick one token: every number on paper.

    Windows are tokens 0-31 and 16-47. The key MLP reads token 0 of a window and the value MLP its token 31,
    each with a position encoding of 1 there; its weights are 1, and silu(x) = x / (1 + e^-x).
    Keys k0 = 1, k16 = -1 (others 7, never read): inputs 2 and 0, compressed keys silu(2) = 1.761594 and 0.
    Values v31 = 0, v47 = 1: inputs 1 and 2, compressed values silu(1) = 0.731059 and silu(2) = 1.761594.
    Query 46 sees the first window only (the second ends at 47): output 0.731059. Query 47 with q = 1 and
    scale 1 has weights e^1.761594 : e^0 = 5.821711 : 1, so 0.853409 and 0.146591, and the output
    0.853409 * 0.731059 + 0.146591 * 1.761594 = 0.882126.
    Blocks of 16: both windows have two strides; block 0 shares one with window 0, block 1 one with each,
    block 2 one with window 1: scores 0.853409, 1, 0.146591. Of blocks 0 and 1 (2 is local) 1 is the best.
    """
    keys, values = torch.full((48, 1, 1), 7.0), torch.full((48, 1, 1), 7.0)
    keys[0], keys[16], values[31], values[47] = 1.0, -1.0, 0.0, 1.0

    def picks(token):
        position, w_in = torch.zeros(1, 32, 1), torch.zeros(1, 32, 1)
        position[0, token], w_in[0, token] = 1.0, 1.0
        return Compression(position, w_in, torch.ones(1, 1, 1))

    cu_seqlens = torch.tensor([0, 48], dtype=torch.int32)
    found = compressed_attention(
        torch.ones(48, 1, 1),
        keys,
        values,
        picks(0),
        picks(31),
        *token_positions(cu_seqlens, 48),
        cu_seqlens,
        topk=1,
        init_tokens=0,
        local_tokens=16,
        block_tokens=16,
    )
    out = found.out.flatten().tolist()
    assert out[:31] == [0.0] * 31
    assert out[31:47] == pytest.approx([0.731059] * 16, abs=1e-6)
    assert out[47] == pytest.approx(0.882126, abs=1e-6)
    assert found.ids.flatten()[47] == 1
    # Queries 32 to 46 see the first window only: blocks 0 and 1 share as much of it, and the lower one wins.
    assert found.ids.flatten()[32:47].tolist() == [0] * 15


def test_scores_of_blocks_are_the_papers_sums_of_windows():
    """Equation 9 for l = 32, d = 16, l' = 64, counted from 1: windows 4j - m - n, m below 4 and n below 2."""
    num_windows, num_blocks = 11, 3
    weights = torch.zeros(num_windows, num_blocks, dtype=torch.int64)
    for j in range(1, num_blocks + 1):
        for m in range(4):
            for n in range(2):
                window = 4 * j - m - n
                if 1 <= window <= num_windows:
                    weights[window - 1, j - 1] += 1
    assert torch.equal(shared_strides(num_windows, num_blocks, 64, torch.device("cpu")), weights)
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0]


def test_packed_documents_are_those_alone():
    inputs = _inputs()
    packed = _run(inputs)
    q, k, v, *weights = inputs
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        if end > start:
            angles = torch.cat([ANGLES, ANGLES], 1)[start:end]
            part = q[start:end], k[start:end], v[start:end], *weights
            alone = _run(part, [0, end - start], angles=angles)
            torch.testing.assert_close(packed.out[start:end], alone.out, rtol=1e-13, atol=1e-14)
            assert torch.equal(packed.ids[start:end], alone.ids)


def test_documents_without_a_window_give_zero_and_zero_gradients():
    inputs = _inputs(40)
    found = _run(inputs, [0, 20, 40])
    assert found.out.abs().max() == 0
    for gradient in torch.autograd.grad(found.out.sum(), _leaves(inputs)):
        assert gradient.abs().max() == 0


def test_windows_never_cross_a_document():
    assert window_starts([31, 32, 80]) == ([31, 63, 79, 95, 111], [0, 1, 4])


def test_what_it_does_not_have_is_refused():
    with pytest.raises(NotImplementedError, match="impl='reference' only, not 'triton'"):
        _run(_inputs(), impl="triton")
    with pytest.raises(ValueError, match="block_tokens=24 is no multiple"):
        _run(_inputs(), block_tokens=24, init_tokens=0, local_tokens=24)
