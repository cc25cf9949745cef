"""Everything that differs between megatron-core 0.16.1 and 0.19.2, except checkpoint calls.

Checkpoint calls are in `mcore_checkpointing.py`. No other file reads a version or a signature of
megatron-core.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from phsa_megatron.config.errors import DeviceError

OLDEST = (0, 16, 1)
FIRST_UNKNOWN = (0, 20)

HARMLESS_ATTENTION_ARGUMENTS = frozenset({"name"})
"""Constructor arguments that change nothing in what a core attention computes, such as a label for logs."""


def installed_version() -> tuple[int, ...]:
    """Return the version of megatron-core as numbers, without a suffix.

    Raises:
        DeviceError: megatron-core is not installed, or its version is not one this framework was tried with.
    """
    try:
        text = version("megatron-core")
    except PackageNotFoundError:
        raise DeviceError(
            "megatron-core is not installed; training needs it: pip install 'phsa-megatron[train]'"
        ) from None
    return parse_version(text)


def parse_version(text: str) -> tuple[int, ...]:
    """Return a supported megatron-core version as numbers, without a suffix.

    Raises:
        DeviceError: the version is outside of what this framework was tried with.
    """
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    found = tuple(numbers)
    if not OLDEST <= found < FIRST_UNKNOWN:
        raise DeviceError(
            f"megatron-core {text} is installed; supported are {'.'.join(map(str, OLDEST))} up to, not "
            f"including, {'.'.join(map(str, FIRST_UNKNOWN))}: pip install 'megatron-core>=0.16.1,<0.20'"
        )
    return found


def hide_known_notices() -> None:
    """Hide what megatron-core says in every process about libraries and defaults that are known here.

    `phsa-train doctor` lists optional libraries; a run need not.
    """
    for message in (
        "Transformer Engine and Apex are not installed",
        # Its norm is replaced by model.norm.RMSNorm.
        "Apex is not installed. Falling back to Torch Norm",
        # Said of megatron's own default.
        "full scope is deprecated",
        # Newer torch names for the collectives that megatron calls.
        "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
        # Megatron looks at the gradients of its own views of the parameter buffer.
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Said at every save into a folder that exists; ours exists because it is staged before it is committed.
    logging.getLogger("megatron.core.dist_checkpointing.serialization").addFilter(
        lambda record: "Overwriting old incomplete" not in record.getMessage()
    )


def mtp_block_spec(
    transformer_config: Any,
    layer_spec_at: Callable[[int], Any],
    norm: type,
    vp_stage: int | None,
) -> Any | None:
    """Return the spec of the multi-token-prediction block, or None where this process builds none of it.

    Megatron puts the same layer at every depth; here every depth has its own layer, because the side
    information of depth d is shifted by d tokens.

    Args:
        transformer_config: megatron's TransformerConfig.
        layer_spec_at: the transformer layer's spec at a depth, from 1.
        norm: class of the three norms of a depth.
        vp_stage: model chunk of this pipeline stage, or None without virtual stages.
    """
    # Imported here so that versions can be asked for without megatron's seconds of import.
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    block = get_gpt_mtp_block_spec(
        transformer_config, layer_spec_at(1), use_transformer_engine=False, vp_stage=vp_stage
    )
    if block is None:
        return None
    depths = [copy.copy(spec) for spec in block.layer_specs]
    for depth, spec in enumerate(depths, start=1):
        spec.submodules = copy.copy(spec.submodules)
        # 0.16.1 calls the field transformer_layer, 0.19.2 mtp_model_layer.
        field = "mtp_model_layer" if hasattr(spec.submodules, "mtp_model_layer") else "transformer_layer"
        setattr(spec.submodules, field, layer_spec_at(depth))
        spec.module = _recomputable(spec.module)
        spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = norm
    block.layer_specs = depths
    return block


def prepare_experts() -> None:
    """Let experts run without Transformer Engine, and on the CPU, where megatron-core alone does not.

    0.16.1 asks whether a function of Transformer Engine is None, and has no such name without it. On the CPU
    both versions hand the sizes of an all-to-all as tensors, because they turn them into lists only on their
    way from a GPU.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    module: Any = moe_utils
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None
    original = module.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, Tensor) and not tensor.is_cuda:
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move


def install_fused_rotation(rotate: Callable[..., Tensor]) -> None:
    """Give megatron the function that `apply_rope_fusion` calls, where there is no Transformer Engine's.

    Args:
        rotate: takes queries or keys [S, b, heads, D], angles [S, 1, 1, D] and `interleaved`.
    """
    from megatron.core.models.common.embeddings import rope_utils

    module: Any = rope_utils
    if module.fused_apply_rotary_pos_emb is None:
        module.fused_apply_rotary_pos_emb = rotate


def balancing_loss_factor(num_sharing: int) -> int:
    """Return what the weight of the experts' balancing loss is multiplied by.

    Every process that shares a sequence adds its part of this loss. 0.16.1 weights each part with the tokens
    of that process alone, so that the sum is too small by as many as share; 0.19.2 weights with all.

    Args:
        num_sharing: context-parallel x sequence-parallel processes.
    """
    return num_sharing if installed_version() < (0, 19) else 1


def forget_expert_losses() -> None:
    """Empty megatron's process-wide sums of balancing losses, and their scale: the next model has others."""
    from megatron.core.transformer.moe import moe_utils

    module: Any = moe_utils
    module.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if hasattr(module, "get_moe_layer_wise_logging_tracker"):  # 0.16.1
        module.get_moe_layer_wise_logging_tracker().clear()
    else:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        get_moe_metrics_tracker().clear()


def forget_mtp_losses() -> None:
    """Empty megatron's process-wide sums of prediction losses: the next model may have other depths."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()


def _recomputable(layer: type) -> type:
    """Return a prediction layer that can be recomputed while side information rides on packed_seq_params.

    0.16.1 hands every argument to the checkpoint function, which accepts tensors only; later versions keep
    the others in a closure, which is what this class adds.
    """
    original = layer._checkpointed_forward  # type: ignore[attr-defined]
    if "forward_func" not in inspect.signature(original).parameters:
        return layer

    def _checkpointed_forward(self: Any, forward_func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plain = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        names = [name for name in kwargs if name not in plain]

        def on_tensors(*tensors: Tensor) -> Any:
            return forward_func(*args, **dict(zip(names, tensors, strict=True)), **plain)

        return original(self, on_tensors, *(kwargs[name] for name in names))

    return type("RecomputablePredictionLayer", (layer,), {"_checkpointed_forward": _checkpointed_forward})
