"""The block indexer: choice, loss and gradients against loops in fp64, and what its loss must not reach."""

import math

import pytest
import torch

from phsa_kernels.api import token_positions
from phsa_kernels.indexer import IndexWeights, distillation_loss, select_indexed

D, HEADS, KV, J, E, M = 4, 6, 2, 3, 5, 4
BOUNDS = [0, 3, 3, 50, 71]
WINDOWS = {"init_tokens": 4, "local_tokens": 8, "block_tokens": M}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g, requires_grad=True)

    group = HEADS // KV * D
    weights = IndexWeights(draw(KV, group, J * E), draw(KV, D, E), draw(KV, group, J))
    return draw(BOUNDS[-1], HEADS, D), draw(BOUNDS[-1], KV, D), weights


def _where():
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    return *token_positions(cu_seqlens, BOUNDS[-1]), cu_seqlens


def _by_loops(q, k, weights):
    """Yield (token, head, candidates, index scores, target) of every query with candidates, one at a time."""
    group = HEADS // KV
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        for i in range(start, end):
            current = (i - start) // M
            candidates = [b for b in range((end - start) // M) if 1 <= b <= current - 2]
            for head in range(KV if candidates else 0):
                joined = torch.cat([q[i, head * group + r] for r in range(group)])
                scores = []
                for b in candidates:
                    mean = sum(k[start + b * M + t, head] for t in range(M)) / M
                    score = 0.0
                    for j in range(J):
                        index_query = joined @ weights.query[head][:, j * E : (j + 1) * E]
                        dot = index_query @ (mean @ weights.key[head])
                        score = score + (joined @ weights.head[head][:, j]) * torch.relu(dot)
                    scores.append(score / math.sqrt(J * E))
                mass = dict.fromkeys(candidates, 0.0)
                for r in range(group):
                    powers = [
                        math.exp((q[i, head * group + r] @ k[t, head]).item() / math.sqrt(D))
                        for t in range(start, i + 1)
                    ]
                    for b in candidates:
                        mass[b] += sum(powers[b * M : (b + 1) * M]) / sum(powers)
                target = [mass[b] / sum(mass.values()) for b in candidates]
                yield i, head, candidates, torch.stack(scores), target


def test_blocks_are_those_with_the_largest_index_scores(inputs):
    q, k, weights = inputs
    ids = select_indexed(q, k, weights, *_where(), topk=2, **WINDOWS)
    expected = torch.full_like(ids, -1)
    for i, head, candidates, scores, _ in _by_loops(q, k, weights):
        best = sorted(zip(candidates, scores.tolist(), strict=True), key=lambda x: (-x[1], x[0]))[:2]
        expected[i, head, : len(best)] = torch.tensor(sorted(b for b, _ in best), dtype=torch.int32)
    assert torch.equal(ids, expected)
    assert (ids >= 0).any() and not ids.requires_grad


def test_loss_and_gradients_are_those_of_loops(inputs):
    q, k, weights = inputs
    found = distillation_loss(q, k, weights, *_where(), **WINDOWS)
    expected = torch.zeros((), dtype=torch.float64)
    for _, _, _, scores, target in _by_loops(q.detach(), k.detach(), weights):
        log_index = scores - torch.log(sum(torch.exp(s) for s in scores))
        for p, log_q in zip(target, log_index, strict=True):
            expected = expected + p * (math.log(p) - log_q)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients, wanted = (torch.autograd.grad(x, weights) for x in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        # Sums of some hundred terms in another order.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * other.abs().max().item())
        assert other.abs().max() > 0
    less = distillation_loss(q, k, weights, *_where(), **{**WINDOWS, "local_tokens": 12})
    assert not torch.allclose(less, expected, rtol=1e-3)


def test_the_loss_reaches_the_indexer_alone(inputs):
    q, k, weights = inputs
    loss = distillation_loss(q, k, weights, *_where(), **WINDOWS)
    assert torch.autograd.grad(loss, [q, k], retain_graph=True, allow_unused=True) == (None, None)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, weights))


def test_training_it_brings_it_to_dense_attention(inputs):
    """The loss falls to a small part of what it was, and recall of the best block rises."""
    q, k, weights = inputs
    optimizer = torch.optim.Adam(weights, lr=0.05)
    first = distillation_loss(q, k, weights, *_where(), **WINDOWS).item()

    def recall():
        ids = select_indexed(q, k, weights, *_where(), topk=1, **WINDOWS)
        cases = [
            (ids[i, h, 0], c[t.index(max(t))]) for i, h, c, _, t in _by_loops(q, k, weights) if len(c) > 1
        ]
        return sum(int(chosen) == best for chosen, best in cases) / len(cases)

    before = recall()
    for _ in range(150):
        optimizer.zero_grad()
        loss = distillation_loss(q, k, weights, *_where(), **WINDOWS)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    assert recall() > before + 0.2


def test_documents_without_a_choice_give_a_loss_of_zero_with_a_gradient(inputs):
    q, k, weights = inputs
    cu_seqlens = torch.tensor([0, 12, 24], dtype=torch.int32)
    where = token_positions(cu_seqlens, 24)
    loss = distillation_loss(q[:24], k[:24], weights, *where, cu_seqlens, **WINDOWS)
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, weights))


def test_another_implementation_is_refused(inputs):
    with pytest.raises(NotImplementedError, match="impl='reference' only, not 'triton'"):
        select_indexed(*inputs, *_where(), topk=1, impl="triton", **WINDOWS)
