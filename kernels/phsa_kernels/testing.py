"""Inputs and error budgets for tests and benchmarks of the kernels; not needed to use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phsa_kernels import api

OUTPUTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Shape:
    """One case: documents, heads and the method's settings."""

    lengths: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int
    topk: int
    init_tokens: int
    local_tokens: int
    block_tokens: int = 16
    group_score: str = "softmax_sum"
    dense_len_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    def windows(self) -> dict[str, int]:
        """Return the keyword arguments that `select` and `attend` share."""
        return {
            "init_tokens": self.init_tokens,
            "local_tokens": self.local_tokens,
            "block_tokens": self.block_tokens,
        }

    def cu_seqlens(self, device: torch.device | str) -> Tensor:
        """Return the document boundaries, int32."""
        ends = torch.tensor(self.lengths, dtype=torch.int64).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(device=device, dtype=torch.int32)


@dataclass(frozen=True)
class Comparison:
    """Relative L2 error against fp64 truth, of the kernels and of eager PyTorch in the inputs' dtype.

    `worst_token` is the kernels' largest error of one token, over the root mean square norm of all tokens: a
    mistake in a few tokens drowns in the whole tensor's norm.
    """

    name: str
    kernel: float
    eager: float
    budget: float
    worst_token: float
    worst_budget: float

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.kernel <= self.budget and self.worst_token <= self.worst_budget


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> list[Tensor]:
    """Return q, k, v (require gradients), pooling weights fp32, and upstream gradients of out and lse."""
    generator = torch.Generator().manual_seed(seed)
    n, heads = shape.num_tokens, (shape.heads_q, shape.heads_kv, shape.heads_kv)
    qkv = [torch.randn(n, h, shape.head_dim, generator=generator) for h in heads]
    weights = torch.rand(n, generator=generator)
    grad_out = torch.randn(n, shape.heads_q, shape.head_dim, generator=generator)
    grad_lse = torch.randn(n, shape.heads_q, generator=generator)
    moved = [x.to(device=device, dtype=dtype).requires_grad_() for x in qkv]
    return [*moved, weights.to(device), grad_out.to(device=device, dtype=dtype), grad_lse.to(device)]


def attend_and_gradients(
    impl: str, shape: Shape, qkv: list[Tensor], ids: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> list[Tensor]:
    """Return out, lse, dq, dk, dv of `attend` over the given ids, every token a query."""
    cu_seqlens = shape.cu_seqlens(ids.device)
    q_pos, q_doc = api.token_positions(cu_seqlens, shape.num_tokens)
    q, k, v = qkv
    out, lse = api.attend(
        q,
        k,
        v,
        ids,
        q_pos,
        q_doc,
        cu_seqlens,
        init_tokens=shape.init_tokens,
        local_tokens=shape.local_tokens,
        block_tokens=shape.block_tokens,
        dense_len_tokens=shape.dense_len_tokens,
        impl=impl,
    )
    return [out, lse, *torch.autograd.grad([out, lse], qkv, [grad_out.to(out.dtype), grad_lse])]


def relative_errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Return the L2 norm of x - truth over that of truth (over 1 if truth is zero), and the worst token's."""
    tokens = len(truth)
    exact = truth.double().reshape(tokens, -1)
    error = (x.double().reshape(tokens, -1) - exact).norm(dim=1)
    norm = float(exact.norm()) or 1.0
    return float(error.norm()) / norm, float(error.max()) / norm * float(tokens) ** 0.5


def compare_with_truth(
    shape: Shape, qkv: list[Tensor], ids: Tensor, grad_out: Tensor, grad_lse: Tensor, kernel: list[Tensor]
) -> list[Comparison]:
    """Hold the kernels' results, for their own ids, to a budget derived from eager PyTorch's own error.

    The kernels round where eager PyTorch in this dtype does not: the probabilities (or their gradients)
    before the second product, a block's partial sum before the windows' share is added, and the
    result. Each adds at most one unit of rounding, so the budget is the eager error and three units; lse
    stays in fp32, with sums and base-2 exponentials in another order: sixteen units of fp32.

    fp32 operands have those sixteen units everywhere. Their dK and dV of one key are also sums over up to
    `rows` queries and heads, one after another: a sum that has grown to sqrt(i) after i terms is rounded by
    up to one unit of that, uniformly, so n terms add sqrt(n / 6) units of the whole in the mean square.
    """
    rows = max(shape.lengths) * (shape.heads_q // shape.heads_kv)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = attend_and_gradients("reference", shape, exact, ids, grad_out, grad_lse)
    eager = attend_and_gradients("reference", shape, qkv, ids, grad_out, grad_lse)
    found = []
    for name, mine, theirs, true in zip(OUTPUTS, kernel, eager, truth, strict=True):
        unit = torch.finfo(torch.float32 if name == "lse" else qkv[0].dtype).eps / 2
        full = qkv[0].dtype == torch.float32
        units = 16.0 if full or name == "lse" else 3.0
        units += (rows / 6) ** 0.5 if full and name in ("dk", "dv") else 0.0
        (kernel_error, kernel_worst), (error, worst) = (relative_errors(x, true) for x in (mine, theirs))
        # One token's norm may be several times the mean (early tokens attend to few keys): four times.
        worst_budget = 2 * worst + 4 * units * unit
        found.append(Comparison(name, kernel_error, error, error + units * unit, kernel_worst, worst_budget))
    return found


def queries_per_distinct_block(ids: Tensor, tile_queries: int = 32) -> float:
    """Return the mean over tiles of consecutive queries of choices per distinct block (second half)."""
    tiles = ids.shape[0] // tile_queries
    late = ids[tiles // 2 * tile_queries : tiles * tile_queries]
    by_tile = late.reshape(-1, tile_queries, *late.shape[1:]).transpose(1, 2).flatten(2).flatten(0, 1)
    by_tile = by_tile.sort(-1).values
    distinct = (by_tile[:, 1:] != by_tile[:, :-1]).sum(-1) + 1
    return float((by_tile.shape[1] / distinct.float()).mean())
