"""RMSNorm in Triton against fp64: outputs, both gradients, rows inside wider ones, and a control."""

import pytest
import torch

pytest.importorskip("triton")

from phsa_megatron.config.compute_rules import WIDEST_NORM
from phsa_megatron.model.norm_kernels import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# The interpreter cuts fp32 to bf16 where a GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SHAPES = {
    "one row": (1, 64),
    "residual stream": (5, 2, 256),
    "a width that is no power of two": (37, 3, 576),
    "heads": (61, 1, 3, 128),
    "narrower than a step": (300, 16),
}


def exact(x, weight, grad, eps=EPS):
    """fp64, written out."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal, scaled = x * rstd, grad * weight
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return normal * weight, dx, (grad * normal).flatten(0, -2).sum(0)


def made(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = 1 + torch.rand(shape[-1], generator=generator).to(DEVICE, dtype)
    return x.requires_grad_(), weight.requires_grad_(), grad


def errors(found, truth):
    return [float((a.detach().double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


def budgets(dtype, rows):
    """One rounding of the result, and fp32: sums of a row, and of the weight's gradient over all rows."""
    unit, fp32 = torch.finfo(dtype).eps / 2, 2.0**-24
    return [unit + 16 * fp32, unit + 32 * fp32, unit + (16 + (rows / 6) ** 0.5) * fp32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients_are_those_of_fp64(shape, dtype):
    x, weight, grad = made(shape, dtype)
    y = rms_norm(x, weight, EPS)
    found = [y, *torch.autograd.grad(y, [x, weight], grad)]
    assert [t.dtype for t in found] == 3 * [dtype]
    rows = x.numel() // shape[-1]
    truth = exact(x.detach(), weight.detach(), grad)
    got = errors(found, truth)
    assert all(a <= b for a, b in zip(got, budgets(dtype, rows), strict=True)), got


def test_heads_that_lie_in_wider_rows_are_read_where_they_are():
    wide, weight, grad = made((50, 1, 2, 4 * 64), torch.float32)
    weight, grad = weight.detach()[:64].requires_grad_(), grad[..., :64].contiguous()
    part = wide[..., 128:192]
    y = rms_norm(part, weight, EPS)
    found = [y, *torch.autograd.grad(y, [wide, weight], grad)]
    truth = exact(part.detach(), weight.detach(), grad)
    assert not found[1][..., :128].any() and not found[1][..., 192:].any()
    found[1] = found[1][..., 128:192]
    assert all(a <= b for a, b in zip(errors(found, truth), budgets(torch.float32, 100), strict=True))


def test_an_epsilon_that_is_forgotten_is_noticed():
    """Negative control: small rows, for which epsilon counts."""
    x, weight, grad = made((20, 64), torch.float32)
    x = (x.detach() * 1e-3).requires_grad_()
    y = rms_norm(x, weight, 1e-5)
    found = [y, *torch.autograd.grad(y, [x, weight], grad)]
    right = errors(found, exact(x.detach(), weight.detach(), grad, 1e-5))
    wrong = errors(found, exact(x.detach(), weight.detach(), grad, 0.0))
    limits = budgets(torch.float32, 20)
    assert all(a <= b for a, b in zip(right, limits, strict=True)), right
    assert all(a > b for a, b in zip(wrong, limits, strict=True)), wrong


def test_two_runs_are_equal_to_the_bit():
    x, weight, grad = made((3000, 128), torch.bfloat16)
    runs = []
    for _ in range(2):
        y = rms_norm(x, weight, EPS)
        runs.append([y, *torch.autograd.grad(y, [x, weight], grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 64), torch.float64), ((1, WIDEST_NORM + 1), torch.float32)]
)
def test_what_it_cannot_take_is_named(shape, dtype):
    with pytest.raises(ValueError, match="set compute.norm=torch"):
        rms_norm(torch.ones(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype), EPS)
