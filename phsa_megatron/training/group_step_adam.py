"""AdamW in torch alone, with its step counter in the parameter group, where megatron-core looks for it.

Without Transformer Engine and apex, megatron-core falls back to `torch.optim.AdamW`, which counts steps per
parameter. Its DistributedOptimizer cannot resume that (0.16.1 and 0.19.2): `state_dict` of a fresh optimizer
fails on `assert len(steps) == 1`, and with filled-in state the load fails on `KeyError: 'step'`. FusedAdam of
either library counts in the group, and so does this class; the arithmetic is torch's own `adamw`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import clip_grads, distrib_optimizer
from torch.optim.adamw import adamw

from phsa_megatron.config.schema import Adam
from phsa_megatron.parallel.optional_libraries import required

_IMPORTED: Any = megatron_optimizer.Adam
_FELL_BACK: bool = megatron_optimizer.USING_PYTORCH_OPTIMIZER
"""Whether megatron found neither Transformer Engine nor apex when it was imported."""
_LIBRARY = {Adam.apex: "apex.optimizers", Adam.transformer_engine: "transformer_engine.pytorch.optimizers"}


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW as `torch.optim.AdamW`, bit for bit, but with `step` (an int) in the parameter group.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        adam_w_mode: must be true; L2 regularization is not offered.
        capturable: must be false; the step counter is a Python number, which a CUDA graph cannot capture.

    Raises:
        ValueError: one of the last two is set otherwise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("GroupStepAdam decays weights decoupled only: adam_w_mode must be true")
        if capturable:
            raise ValueError("GroupStepAdam cannot be captured in a CUDA graph: capturable must be false")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient, and counts one step in each group with parameters."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            if not group["params"]:
                continue  # a checkpoint aligns the counters; FusedAdam does not count here either
            params = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in params]
            steps_before = group.get("step", 0)
            fused = bool(params) and all(p.is_cuda for p in params)
            # torch counts up in place, one tensor a parameter; the fused kernel wants them on its device.
            steps = torch.full(
                (len(params),), float(steps_before), device=params[0].device if fused else "cpu"
            )
            adamw(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                list(steps.unbind()),
                # On the CPU as ever: results of earlier runs are kept to the bit.
                fused=fused or None,
                amsgrad=False,
                maximize=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            group["step"] = steps_before + 1
        return loss

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """Returns the norm of all tensors, fp32 [1].

    On a GPU megatron's own function waits for the device at each tensor. On a CPU torch adds the squares of a
    whole tensor into a handful of fp32 sums, one after the other, and small squares vanish beside a large
    sum: a million elements lost 4e-4 of their norm, and shards of them less, so that the norm depended on the
    layout. In fp64 what is left is the rounding of the result.
    """
    tensors = [tensor for every in lists for tensor in every]
    if tensors[0].is_cuda:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))).reshape(1), None
    norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    return torch.linalg.vector_norm(norms).float().reshape(1), None


def _scale(chunk_size: int, overflow: torch.Tensor, lists: list[list[torch.Tensor]], scale: float) -> None:
    """Scales tensors in place, all at once."""
    source, target = lists
    if any(a.data_ptr() != b.data_ptr() for a, b in zip(source, target, strict=True)):
        raise ValueError("gradients are clipped in place; source and target differ")
    torch._foreach_mul_(target, scale)


def install(adam: Adam = Adam.auto) -> type:
    """Makes megatron-core use the AdamW that a recipe asks for, and returns its class.

    Megatron chooses when it is imported: Transformer Engine's, else apex's, else torch's. With `auto` that
    choice stays, but for torch's, in whose place GroupStepAdam comes.

    Raises:
        DeviceError: a library is asked for by name and absent.
    """
    if adam in _LIBRARY:
        setting = f"compute.adam={adam}"
        chosen: type = required(setting, _LIBRARY[adam], "FusedAdam", instead="compute.adam=torch")
    else:
        chosen = GroupStepAdam if adam == Adam.torch or _FELL_BACK else _IMPORTED
    if _FELL_BACK:
        clip_grads.l2_norm_impl = _l2_norm
    if _FELL_BACK and torch.cuda.is_available():
        clip_grads.multi_tensor_scale_impl = _scale
    megatron_optimizer.Adam = distrib_optimizer.Adam = chosen
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    # These send DistributedOptimizer down its FusedAdam paths, which keep `step` in the group.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return chosen
