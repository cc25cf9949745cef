"""A micro-batch's forward and backward pass as two CUDA graphs, recorded once and replayed.

The host launches every kernel of every layer. Where a micro-batch is short or the host slow, the
device waits for it: recorded, a pass is one launch. Shapes of a micro-batch never depend on data and nothing
in its passes is read by the host, so that kernels, their order and their results are those of the eager
passes, to the last bit. The exchange of keys under context parallelism is recorded with the rest; its time is
then not in `perf/communication_s`. What a recording cannot hold is refused by the rules of
`compute.cuda_graphs`, or is computed eagerly in the steps that need it: those that look at selections or
logits, and injected faults.

Its activations stay in memory of the graphs between steps. So a recording is given back before anything else
computes, and made again afterwards; that takes one micro-batch's host time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from phsa_megatron.config.schema import AttentionKind
from phsa_megatron.data.batches import Batch
from phsa_megatron.parallel import collective_trace
from phsa_megatron.parallel.exchange import traffic
from phsa_megatron.training.forward_step import ForwardStep, Inputs

_COPIED = tuple(field.name for field in fields(Inputs) if field.name != "host_cu_seqlens")


class _Result(NamedTuple):
    """What a micro-batch leaves behind besides gradients."""

    num_tokens: Tensor
    rows: Tensor


class Recording:
    """The kernels of one pass, and the tensors that they fill.

    Args:
        work: the pass; what it returns is filled again by every replay.
        stream: to record on.
        pool: memory that passes share; None for memory of its own.
    """

    def __init__(self, work: Callable[[], Any], stream: Any, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._sent = [0, 0]
        # Of this thread only: others pin the memory of batches to come meanwhile.
        recording = torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        # Collectives are recorded, not made: nobody may time them, and each replay sends their bytes.
        with _no_collection(), collective_trace.unheard(), traffic.apart(self._sent), recording:
            self._result = work()

    @property
    def pool(self) -> Any:
        """Returns the memory that the next pass may share."""
        return self._graph.pool()

    def replay(self) -> Any:
        """Launches the kernels, and returns what they fill."""
        self._graph.replay()
        traffic.again(self._sent)
        return self._result

    def release(self) -> None:
        """Gives the memory back."""
        self._result = None
        self._graph.reset()


class MicroBatchGraph:
    """Runs the micro-batches of training steps of a model that is one chunk on one device, by recordings.

    The model has to be wrapped for data parallelism inside of `stream_for_gradients`.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._config: Any = None
        self._warm: set[Any] = set()
        self._key: Any = None
        self._inputs: Inputs | None = None
        self._passes: tuple[Recording, ...] = ()

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """Runs on the stream that is recorded, after all that was asked for before.

        Gradients are summed on the stream on which the model was wrapped, and a recording cannot reach the
        default stream.
        """
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    @staticmethod
    def serves(forward_step: ForwardStep) -> bool:
        """Returns whether a step's passes can be replayed: nobody looks at them, and no fault is injected."""
        watched = (forward_step.recorder, forward_step.logits, forward_step.losses)
        return all(x is None for x in watched) and not forward_step.poisoned

    def run(
        self, model: DistributedDataParallel, batches: list[Batch], forward_step: ForwardStep
    ) -> list[Tensor]:
        """Runs the micro-batches of one step, as `step.forward_backward` does.

        Args:
            model: the chunk, in its wrapper.
            batches: this process's micro-batches.
            forward_step: of this step; `serves` it.

        Returns:
            fp64 [2, b] of each: nats and tokens of each sequence. Gradients are summed, reduced and divided.
        """
        if forward_step.config is not self._config:
            self.release()
            self._config = forward_step.config
            self._warm.clear()
        results = []
        with self.on_own_stream():
            for batch in batches:
                results.append(self._run_one(model, batch, forward_step))
            num_tokens = torch.stack([result.num_tokens for result in results]).sum(dtype=torch.int32)
            model.config.finalize_model_grads_func([model], num_tokens)
        return [result.rows for result in results]

    def release(self) -> None:
        """Gives the memory of the recording back, if there is one."""
        for recording in self._passes:
            recording.release()
        self._key, self._inputs, self._passes = None, None, ()

    def _run_one(self, model: DistributedDataParallel, batch: Batch, forward_step: ForwardStep) -> _Result:
        key = _key(batch, forward_step)
        if key not in self._warm:
            # Kernels are compiled and libraries opened by the first passes: no recording may hold that.
            self.release()
            self._warm.add(key)
            return self._eager(model, batch, forward_step)
        if key != self._key:
            self.release()
            self._record(model, batch, forward_step)
            self._key = key
        given = Inputs.of_batch(batch, forward_step.groups)
        for name in _COPIED:
            getattr(self._inputs, name).copy_(getattr(given, name))
        forward, backward = self._passes
        forward_step.enter("forward")
        num_tokens, rows = forward.replay()
        forward_step.enter("backward")
        backward.replay()
        # The next replay fills the same memory.
        return _Result(num_tokens.clone(), rows.clone())

    @staticmethod
    def _eager(model: DistributedDataParallel, batch: Batch, forward_step: ForwardStep) -> _Result:
        forward_step.enter("forward")
        inputs = Inputs.of_batch(batch, forward_step.groups)
        total, num_tokens, rows = forward_step.loss(inputs.loss_mask, forward_step.output(inputs, model))
        forward_step.enter("backward")
        total.backward()  # type: ignore[no-untyped-call]
        return _Result(num_tokens, rows)

    def _record(self, model: DistributedDataParallel, batch: Batch, forward_step: ForwardStep) -> None:
        given = Inputs.of_batch(batch, forward_step.groups)
        inputs = replace(given, **{name: getattr(given, name).clone() for name in _COPIED})
        self._inputs = inputs
        unheard = replace(forward_step, progress=None)
        totals: list[Tensor] = []

        def forward() -> _Result:
            total, num_tokens, rows = unheard.loss(inputs.loss_mask, unheard.output(inputs, model))
            totals.append(total)
            return _Result(num_tokens, rows)

        def backward() -> None:
            totals.pop().backward()  # type: ignore[no-untyped-call]

        with _named("forward"):
            first = Recording(forward, self._stream, None)
        with _named("backward"):
            self._passes = first, Recording(backward, self._stream, first.pool)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's collector still.

    What it finds may own closed communicators or other recordings, whose end asks the device for what breaks
    a recording; and torch collects before a recording only when told to.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says which pass was recorded when an error came up: CUDA's own words name neither."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"while the {name} pass of a micro-batch was recorded (compute.cuda_graphs=micro_batch). If CUDA "
            "speaks of an earlier error, that is the exception above this one. compute.cuda_graphs=none "
            "computes without recordings"
        )
        raise


def _key(batch: Batch, forward_step: ForwardStep) -> Any:
    """Returns what a recording depends on besides the settings and the numbers in its inputs."""
    shapes = tuple(batch.tokens.shape), len(batch.cu_seqlens)
    attention = forward_step.config.attention
    somewhere_dense = forward_step.is_dense or attention.dense_layers or attention.kind == AttentionKind.dense
    # Dense attention takes documents one by one, by their bounds on the host.
    bounds = tuple(batch.cu_seqlens.tolist()) if somewhere_dense else ()
    return shapes, forward_step.topk, forward_step.layer_topk, bool(forward_step.is_dense), bounds
