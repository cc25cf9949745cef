"""What one process of several holds, keeps and sends, against the formulas.

The other processes are not there: torch's fake process group answers every collective at once, with numbers
that mean nothing. Shapes and bytes are those of a real run.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phsa_megatron.config.activations import element_bytes, own_tokens
from phsa_megatron.config.derive import derive
from phsa_megatron.config.memory import chunks_in_flight, stage_memory, stage_parameters
from phsa_megatron.config.planning.communication import communication
from phsa_megatron.config.schema import AttentionKind, KernelImpl, Loss, Recompute
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel import groups as groups_module

_GIB = 1 << 30
RUN = {
    "attention__impl": KernelImpl.triton,
    "optim__micro_batch_sequences": 1,
    "optim__global_batch_sequences": 1,
    "run__train_steps": 1,
    "optim__lr": 1e-3,
}
TP2, SP, CP2 = (
    {"parallel__tensor_size": 2},
    {"parallel__sequence_parallel": True},
    {"parallel__context_size": 2},
)
LAYOUTS = {"tp2": TP2, "tp2_sp": TP2 | SP, "cp2": CP2, "tp2_cp2": TP2 | CP2, "tp2_cp2_sp": TP2 | CP2 | SP}


GATHERS_AND_SCATTERS = {
    "_allgather_base_", "_reduce_scatter_base_", "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
}  # fmt: skip


class SentBytes(TorchDispatchMode):
    """Counts what this process has to send in collectives, and how many there are.

    All-reduces are those of the tensor-parallel group: a gather and a reduce-scatter each.
    """

    def __init__(self, tensor_size):
        super().__init__()
        self.tensor_size, self.num_bytes, self.messages = tensor_size, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            sides = args[:2] if name.endswith(("_base_", "_coalesced_")) else [args[0][0], args[0][0]]
            small, big = sorted(
                sum(t.numel() * t.element_size() for t in tree_leaves(side)) for side in sides
            )
            if name == "allreduce_":
                num_bytes = 2 * big * (self.tensor_size - 1) / self.tensor_size
            else:
                assert name in GATHERS_AND_SCATTERS, name
                num_bytes = big - small
            self.num_bytes += num_bytes
            self.messages += num_bytes > 0
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_of(monkeypatch):
    """Returns `one_of(config, rank)`: the groups of one process of a run whose other processes are absent."""
    opened = []

    def connect(config, rank, world_size, device):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    def start(config, rank=0):
        world_size = config.cluster.processes_per_node
        given = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "none", "MASTER_PORT": 1}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))
        opened.append(groups_module.initialize(config))
        return opened[-1]

    monkeypatch.setattr(groups_module, "_connect", connect)
    without_gloo = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", without_gloo)
    yield start
    for groups in opened:
        groups.close()


def layout(tiny_config, **changes):
    sizes = [changes.get(f"parallel__{kind}_size", 1) for kind in ("tensor", "context", "pipeline")]
    processes = sizes[0] * sizes[1] * sizes[2]
    return tiny_config(**RUN, cluster__processes_per_node=processes, **changes)


# Under context parallelism torch's attention makes a mask on a CPU, which it does not on a GPU.
CASES = [(name, kind) for name in LAYOUTS for kind in AttentionKind if "cp2" not in name or kind == "phsa"]


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_activations_of_a_process_are_what_autograd_keeps(
    tiny_config, one_of, micro_batch, forward, name, recompute, kind
):
    config = layout(tiny_config, attention__kind=kind, parallel__recompute=recompute, **LAYOUTS[name])
    groups = one_of(config)
    (model,) = build_model(config, groups)
    kept = forward(model, micro_batch([0, 64]), config, groups.own_part).kept_bytes
    memory, tokens = derive(config).memory, own_tokens(config)
    softmax = memory.logits_gib * 4 / (4 + element_bytes(config))
    counted = (memory.activations_gib + memory.gathered_kv_gib + softmax) * _GIB
    table = 4 * tokens * config.model.head_dim
    extra = {Recompute.none: 0, Recompute.selective: 2 * 4, Recompute.mlp: 0, Recompute.full: table}[
        recompute
    ]
    # Token ids, labels and their mask; with vocabulary rows elsewhere also the mask of the embedding's ids.
    indices = (17 + (config.parallel.tensor_size > 1)) * tokens
    assert kept == pytest.approx(counted + indices + extra, rel=1e-9)


@pytest.mark.parametrize(
    ("recompute", "loss"), [*((mode, Loss.whole) for mode in Recompute), (Recompute.none, Loss.chunked)]
)
@pytest.mark.parametrize("name", ["tp2", "tp2_sp", "cp2"])
def test_bytes_sent_are_those_of_the_formulas(
    tiny_config, one_of, micro_batch, forward, name, recompute, loss
):
    changes = LAYOUTS[name] | {"compute__loss": loss, "compute__loss_chunk_tokens": 24}
    config = layout(tiny_config, parallel__recompute=recompute, **changes)
    groups = one_of(config)
    (model,) = build_model(config, groups)
    with SentBytes(config.parallel.tensor_size) as sent:
        forward(model, micro_batch([0, 64]), config, groups.own_part).losses.sum().backward()
    derived = derive(config)
    expected = communication(config, derived.parameters, derived.padded_vocab_size)
    kinds = [expected.tensor, expected.context_keys, expected.context_kv, expected.context_gradients]
    assert sent.num_bytes == sum(kind.step_bytes for kind in kinds) > 0
    assert sent.messages == sum(kind.messages for kind in kinds)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("stage", [0, 1])
def test_parameters_of_a_stage_are_those_of_the_built_one(tiny_config, one_of, stage, tensor, mtp, tied):
    config = layout(
        tiny_config,
        parallel__pipeline_size=2,
        parallel__tensor_size=tensor,
        model__mtp_num_layers=mtp,
        model__tie_embeddings=tied,
    )
    (model,) = build_model(config, one_of(config, rank=stage * tensor))
    derived = derive(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == stage_parameters(config, derived.parameters, derived.padded_vocab_size, stage)


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("rows", [1, 2])
def test_a_later_stage_keeps_what_it_got_beside_the_joined_copy_of_it(
    tiny_config, one_of, micro_batch, forward, rows, recompute
):
    """One row is handed on as it came: the first layer keeps the same bytes."""
    config = layout(tiny_config, parallel__pipeline_size=2, parallel__recompute=recompute)
    config.optim.micro_batch_sequences = config.optim.global_batch_sequences = rows
    (model,) = build_model(config, one_of(config, rank=1))
    received = torch.zeros(64, rows, config.model.hidden_size, requires_grad=True)
    model.set_input_tensor(received)
    kept = forward(model, micro_batch([64 * i for i in range(rows + 1)], rows=rows), config).kept_bytes
    kept += 0 if rows == 1 else received.nbytes  # by the schedule, until its gradient leaves
    derived, tokens = derive(config), own_tokens(config)
    sizes = (derived.parameters, derived.padded_vocab_size, 1, 1)
    memory = stage_memory(config, *sizes, stage=1)
    softmax = memory.logits_gib * 4 / (4 + element_bytes(config))
    table = 4 * tokens * config.model.head_dim
    extra = {Recompute.none: 0, Recompute.selective: 4, Recompute.mlp: 0, Recompute.full: table}[recompute]
    # Labels and their mask.
    assert kept == pytest.approx((memory.activations_gib + softmax) * _GIB + 9 * tokens + extra, rel=1e-9)


def test_chunks_that_received_their_rows_are_all_but_the_first_stages_first(tiny_config):
    def counted(stage, rows, virtual=2, **changes):
        sizes = {"parallel__pipeline_size": 4, "parallel__virtual_pipeline_size": virtual, **changes}
        config = layout(tiny_config, model__num_layers=8, **sizes)
        derived = derive(config)
        config.optim.micro_batch_sequences = rows
        sizes = (derived.parameters, derived.padded_vocab_size, 1, 8)
        tokens = 64 * rows * config.model.hidden_size * element_bytes(config)
        return stage_memory(config, *sizes, stage=stage).activations_gib * _GIB / tokens

    def added(stage, virtual):
        """Tensors of a stage's input that two rows keep beyond twice those of one, which are no copies."""
        return counted(stage, 2, virtual) - counted(stage, 1, virtual)

    # Four of eleven, all of nine, and none where there is one chunk that makes its input itself.
    assert (added(0, 2), added(1, 2), added(0, None), added(1, None)) == pytest.approx((4, 9, 0, 3))


@pytest.mark.parametrize("micro_batches", [4, 8, 32])
@pytest.mark.parametrize("virtual", [None, 2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_micro_batches_in_flight_are_those_of_the_schedule(
    tiny_config, one_of, stage, virtual, micro_batches
):
    """A stage warms up, and then holds one more before each backward pass frees one."""
    config = layout(
        tiny_config,
        model__num_layers=8,
        parallel__pipeline_size=4,
        parallel__virtual_pipeline_size=virtual,
    )
    one_of(config, rank=stage)
    total, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, virtual or 1, 4)
    assert total == micro_batches * (virtual or 1)
    assert chunks_in_flight(config, micro_batches, stage) == min(warm_up + 1, total)
