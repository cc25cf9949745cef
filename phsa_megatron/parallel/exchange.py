"""The collectives of context parallelism: asynchronous all-gather, and the reduce-scatter of its backward.

Everything that a layer sends between context-parallel processes goes through these two functions. The bytes
they send are counted by formula in `config/context_volume.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Gathering:
    """An all-gather that is under way.

    Attributes:
        sent: this process's tensor, kept alive until the others have read it.
        received: [size, *sent.shape]; not to be read before `wait`.
    """

    sent: Tensor
    received: Tensor
    work: Any

    def wait(self) -> Tensor:
        """Return all processes' tensors, [size, ...]; on a GPU the current stream waits, not the host."""
        self.work.wait()
        return self.received


def start_all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Gathering:
    """Start to gather `tensor`, of one shape on all processes, and return at once."""
    sent = tensor.contiguous()
    received = sent.new_empty(group.size(), *sent.shape)
    work = dist.all_gather_into_tensor(received.view(-1), sent.view(-1), group=group, async_op=True)
    return Gathering(sent, received, work)


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over processes of `parts[r]`, on process r. `parts` is [size, ...]."""
    sent = parts.contiguous()
    result = sent.new_empty(sent.shape[1:])
    dist.reduce_scatter_tensor(result.view(-1), sent.view(-1), group=group)
    return result
