"""The block indexer: choice, loss and gradients against loops in fp64, and what its loss must not reach."""

import math

import pytest
import torch

from phsa_kernels.api import block_boundaries, token_positions
from phsa_kernels.indexer import Index, distillation_loss, select_indexed

D, HEADS, KV, J, E, M = 4, 6, 2, 3, 5, 4
BOUNDS = [0, 3, 3, 50, 71]
FIRST_ROW = [0, 0, 0, 11, 16]
WINDOWS = {"init_tokens": 4, "local_tokens": 8, "block_tokens": M}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)

    num_tokens = BOUNDS[-1]
    index = Index(draw(num_tokens, KV, J, E), draw(num_tokens, KV, J), draw(num_tokens // M, KV, E))
    return index, draw(num_tokens, HEADS, D), draw(num_tokens, KV, D)


def _select(index, topk, **changes):
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    where = token_positions(cu_seqlens, BOUNDS[-1])
    return select_indexed(index, *where, block_boundaries(cu_seqlens, M), topk=topk, **WINDOWS, **changes)


def _loss(index, q, k, **changes):
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    where = token_positions(cu_seqlens, BOUNDS[-1])
    blocks = block_boundaries(cu_seqlens, M)
    return distillation_loss(index, q, k, *where, cu_seqlens, blocks, **{**WINDOWS, **changes})


def _by_loops(index, q, k):
    """Yield (token, head, candidates, index scores, target) of every query with candidates, one at a time."""
    group = HEADS // KV
    q, k = q.detach(), k.detach()
    for start, end, row in zip(BOUNDS[:-1], BOUNDS[1:], FIRST_ROW, strict=False):
        for i in range(start, end):
            current = (i - start) // M
            candidates = [b for b in range((end - start) // M) if 1 <= b <= current - 2]
            for head in range(KV if candidates else 0):
                scores = []
                for b in candidates:
                    score = 0.0
                    for j in range(J):
                        dot = index.query[i, head, j] @ index.key[row + b, head]
                        score = score + index.weight[i, head, j] * torch.relu(dot)
                    scores.append(score / math.sqrt(J * E))
                mass = dict.fromkeys(candidates, 0.0)
                for r in range(group):
                    dots = [(q[i, head * group + r] @ k[t, head]).item() for t in range(start, i + 1)]
                    powers = [math.exp(dot / math.sqrt(D)) for dot in dots]
                    for b in candidates:
                        mass[b] += sum(powers[b * M : (b + 1) * M]) / sum(powers)
                target = [mass[b] / sum(mass.values()) for b in candidates]
                yield i, head, candidates, torch.stack(scores), target


def test_blocks_are_those_with_the_largest_index_scores(inputs):
    index, q, k = inputs
    ids = _select(index, 2)
    expected = torch.full_like(ids, -1)
    for i, head, candidates, scores, _ in _by_loops(index, q, k):
        best = sorted(zip(candidates, scores.tolist(), strict=True), key=lambda x: (-x[1], x[0]))[:2]
        expected[i, head, : len(best)] = torch.tensor(sorted(b for b, _ in best), dtype=torch.int32)
    assert torch.equal(ids, expected)
    assert (ids >= 0).any() and not ids.requires_grad


def test_loss_and_gradients_are_those_of_loops(inputs):
    index, q, k = inputs
    found = _loss(index, q, k)
    expected = torch.zeros((), dtype=torch.float64)
    for _, _, _, scores, target in _by_loops(index, q, k):
        log_index = scores - torch.log(sum(torch.exp(s) for s in scores))
        for p, log_q in zip(target, log_index, strict=True):
            expected = expected + p * (math.log(p) - log_q)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients, wanted = (torch.autograd.grad(x, index) for x in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        # Sums of some hundred terms in another order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item())
        assert other.abs().max() > 0
    assert not torch.allclose(_loss(index, q, k, local_tokens=12), expected, rtol=1e-3)


def test_the_loss_reaches_the_indexer_alone(inputs):
    index, q, k = inputs
    loss = _loss(index, q, k)
    assert torch.autograd.grad(loss, [q, k], retain_graph=True, allow_unused=True) == (None, None)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, index))


def test_descending_the_loss_brings_it_to_dense_attention(inputs):
    """The loss falls to a small part of what it was, and the best block is chosen more often."""
    index, q, k = inputs
    optimizer = torch.optim.Adam(index, lr=0.05)
    first = _loss(index, q, k).item()

    def recall():
        ids = _select(index, 1)
        cases = [
            (ids[i, h, 0].item(), c[t.index(max(t))])
            for i, h, c, _, t in _by_loops(index, q, k)
            if len(c) > 1
        ]
        return sum(chosen == best for chosen, best in cases) / len(cases)

    before = recall()
    for _ in range(100):
        optimizer.zero_grad()
        loss = _loss(index, q, k)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert recall() > before + 0.2


def test_documents_without_a_choice_give_a_loss_of_zero_with_a_gradient(inputs):
    index, q, k = inputs
    cu_seqlens = torch.tensor([0, 12, 24], dtype=torch.int32)
    where, blocks = token_positions(cu_seqlens, 24), block_boundaries(cu_seqlens, M)
    part = Index(index.query[:24], index.weight[:24], index.key[:6])
    loss = distillation_loss(part, q[:24], k[:24], *where, cu_seqlens, blocks, **WINDOWS)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, index))


def test_another_implementation_is_refused(inputs):
    with pytest.raises(NotImplementedError, match="impl='reference' only, not 'triton'"):
        _select(inputs[0], 1, impl="triton")
