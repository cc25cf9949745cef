"""Weights of a core attention, by key-value head: drawn apart, shared among processes, resharded."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


def drawn_apart(place: str, std: float) -> Callable[[Tensor], Tensor]:
    """Return an initializer that draws from a generator of its own.

    So a selector's weights are a function of the seed and their place, and all other weights of the model are
    those that it has under every selector.

    Args:
        place: names the seed of the run, the layer and the tensor.
        std: of the normal distribution; 0 gives zeros.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))

    def draw(tensor: Tensor) -> Tensor:
        with torch.no_grad():
            return tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    return draw


class HeadWeights(MegatronModule):  # type: ignore[misc]
    """Tensors [Hkv, ...] of which each tensor-parallel process holds those of its key-value heads.

    The first dimension is the sharded one, in the optimizer's norms and in checkpoints.
    """

    def __init__(
        self, config: Any, tp_group: Any, place: str, shapes: dict[str, tuple[int, ...]], zeros: set[str]
    ) -> None:
        """Draw the weights.

        Args:
            config: megatron's TransformerConfig.
            tp_group: tensor-parallel processes.
            place: names the seed and the layer, for `drawn_apart`.
            shapes: name -> shape of one head's tensor.
            zeros: names that start at zero; the others have the standard deviation of the model's weights.
        """
        super().__init__(config=config)
        self.tp_group = tp_group
        size, rank = tp_group.size(), tp_group.rank()
        for name, shape in shapes.items():
            whole = torch.empty(config.num_query_groups, *shape)
            drawn_apart(f"{place}/{name}", 0.0 if name in zeros else config.init_method_std)(whole)
            own = whole.chunk(size)[rank].to(config.params_dtype)
            weight = torch.nn.Parameter(own.clone())
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(name, weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return megatron's description of each tensor's place in the whole model."""
        own = self.state_dict(prefix="", keep_vars=True)
        group = None if metadata is None else metadata["dp_cp_group"]
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=group,
        )
        return sharded
