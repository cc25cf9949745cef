"""Every layout of N processes against one: the layout matrix's cases, and more for N = 2 and 8.

One process computes the step twice: in fp32 with the reference ops (what the rest is held to) and in the
run's dtype and implementation. How far the second is from the first is what rounding does, near ties of the
selection included. A layout rounds in other places: partial sums between tensor-parallel processes, gradients
of keys and values between context-parallel ones. It may be twice as far, in every gradient and in the share
of queries that select other blocks. Negative controls must be farther: one block less, and (with context
parallelism) one process's pooled keys or marks lost.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.schema import (
    Device,
    Dtype,
    KernelImpl,
    PunctuationLanguage,
    PunctuationMatch,
    TrainConfig,
)
from phsa_megatron.data.batches import Batch
from phsa_megatron.parallel.groups import Groups
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.step import ForwardStep, forward_backward, mean_loss, micro_batch_starts
from tests.distributed.layout_matrix import AUTO, CONTIGUOUS, CP2, FULL, LAYOUTS, SP, SPARSE, TP2
from tests.distributed.layout_worker import _gradient_pieces, lost_marks, lost_pooled_keys, set_weights
from tests.distributed.multi_gpu_groups import KeptGroups, Laps

LOSS_BOUND_FRAC = 2.0**-9  # of bf16, half the distance of neighbours: one rounding of every token's loss
CP4, CP8 = ({"parallel__context_size": size} for size in (4, 8))
BESIDE: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2_auto": (2, CP2 | AUTO),
    "cp2_contiguous_sparse": (2, CP2 | CONTIGUOUS | SPARSE),
    "cp2_auto_full": (2, CP2 | AUTO | FULL),
    "dp4": (4, {}),
    "cp8": (8, CP8),
    "cp8_sparse": (8, CP8 | SPARSE),
    "cp8_contiguous_auto": (8, CP8 | CONTIGUOUS | AUTO),
    "dp8": (8, {}),
    "tp2_cp4_sp_sparse": (8, TP2 | CP4 | SP | SPARSE),
    "dp2_tp2_cp2_sp": (8, TP2 | CP2 | SP),
}
"""Layouts on several GPUs that the CPU's matrix does not have."""
WITH_ROWS = ("pp2_rows2", "pp2_vpp2_rows2", "cp2_rows2")


@dataclass(frozen=True)
class Size:
    """Shapes of the model and the text. `gpu` fills the kernels' tiles; `tiny` is for two cores.

    `gpu_shapes` shows on CPU processes, with the reference ops, that controls fail at the shapes of `gpu`.
    """

    device: Device
    dtype: Dtype
    impl: KernelImpl
    seq_len_tokens: int
    hidden: int
    heads: tuple[int, int, int]
    """Query heads, key-value heads, head dim."""
    vocab: int
    windows: tuple[int, int, int]
    """Tokens of a block, of the init and of the local window."""
    num_sequences: int = 8


SIZES = {
    "gpu": Size(Device.cuda, Dtype.bf16, KernelImpl.triton, 1024, 256, (8, 4, 64), 512, (16, 16, 64)),
    "tiny": Size(Device.cpu, Dtype.bf16, KernelImpl.reference, 64, 48, (6, 2, 8), 100, (4, 4, 8)),
}
SIZES["gpu_shapes"] = replace(SIZES["gpu"], device=Device.cpu, impl=KernelImpl.reference)


def cases(processes: int) -> list[str]:
    """Return the names of a run's layout cases, the most important first.

    Of layouts with two sequences a micro-batch, those that hand hidden states or keys to other processes.
    """
    own = [
        name
        for name, (count, _) in (LAYOUTS | BESIDE).items()
        if count == processes and "_ep" not in name and ("rows2" not in name or name in WITH_ROWS)
    ]
    own.sort(key=lambda name: (not name.startswith("cp"), "full" in name or "selective" in name))
    groups = [_group_sizes(name) for name in own]  # those with the same groups follow one another
    own.sort(key=lambda name: groups.index(_group_sizes(name)))
    context = [name for name in own if name.startswith("cp")]
    broken = [f"lost_pooled_keys-{context[0]}"] if context else []
    sparse = [f"lost_marks-{name}" for name in context if name.endswith("sparse")][:1]
    return ["one_block_less-one", *context[:3], *broken, *sparse, *(n for n in own if n not in context[:3])]


def _group_sizes(name: str) -> dict[str, Any]:
    return {key: value for key, value in (LAYOUTS | BESIDE)[name][1].items() if key.endswith("_size")}


def layout_config(size: Size, processes: int, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings of one layout."""
    config = TrainConfig()
    heads, windows = size.heads, size.windows
    values = {
        "run__name": "multi_gpu", "run__train_steps": 10, "run__dtype": size.dtype,
        "model__num_layers": 4, "model__hidden_size": size.hidden, "model__ffn_hidden_size": 2 * size.hidden,
        "model__num_query_heads": heads[0], "model__num_kv_heads": heads[1], "model__head_dim": heads[2],
        "model__vocab_size": size.vocab, "model__vocab_pad_multiple": 64, "model__tie_embeddings": False,
        "attention__block_tokens": windows[0], "attention__init_tokens": windows[1],
        "attention__local_tokens": windows[2], "attention__impl": size.impl,
        "data__seq_len_tokens": size.seq_len_tokens, "data__max_documents_per_sequence": 3,
        "optim__global_batch_sequences": size.num_sequences, "optim__micro_batch_sequences": 1,
        "optim__lr": 1e-3, "parallel__distributed_optimizer": False,
        "cluster__device": size.device, "cluster__processes_per_node": processes,
    }  # fmt: skip
    for key, value in (values | changes).items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def sequence(size: Size, number: int) -> tuple[torch.Tensor, list[int]]:
    """Return tokens int64 [S + 1] and the starts of three documents, off blocks and off chunks."""
    generator = torch.Generator().manual_seed(100 + number)
    length = size.seq_len_tokens
    tokens = torch.randint(0, size.vocab, (length + 1,), generator=generator)
    first = length // 5 + 1 + 3 * number
    return tokens, [0, first, first + length // 3 + number % 5]


def batch(size: Size, first: int, count: int) -> Batch:
    """Return sequences as the data room gives them; every document ends without a label."""
    rows, length = [sequence(size, first + i) for i in range(count)], size.seq_len_tokens
    tokens, mask = torch.stack([tokens for tokens, _ in rows]), torch.ones(count, length)
    bounds = [row * length + start for row, (_, starts) in enumerate(rows) for start in starts]
    bounds.append(count * length)
    mask.view(-1)[torch.tensor(bounds[1:]) - 1] = 0.0
    return Batch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=mask,
        position_ids=torch.arange(length).expand(count, -1),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        domains=["text"] * count,
        sources=["text"] * count,
        pieces=[()] * count,
        num_overflow_tokens=0,
        document_tokens=[end - start for start, end in pairwise(bounds)],
    )


class KeptBlocks:
    """Keeps what the queries selected, by layer and sequence."""

    def __init__(self, size: Size, first_head: int) -> None:
        self.size, self.first_head = size, first_head
        self.found: list[tuple[int, int, int, torch.Tensor, torch.Tensor]] = []
        self._numbers = {sequence(size, n)[0][:-1].numpy().tobytes(): n for n in range(size.num_sequences)}

    def record(self, layer_number: int, *arguments: Any) -> None:
        """Take one layer's selection; see SelectionListener."""
        _, _, _, ids, _, info, *rest = arguments
        length = self.size.seq_len_tokens
        own = rest[0] if rest and rest[0] is not None else torch.arange(len(ids))
        own, ids = own.cpu(), ids.detach().cpu()
        for row, tokens in enumerate(info.token_ids.view(-1, length).cpu()):
            here = own // length == row
            number = self._numbers[tokens.numpy().tobytes()]
            self.found.append((layer_number, number, self.first_head, own[here] % length, ids[here]))


def take_step(config: TrainConfig, groups: Groups, size: Size) -> dict[str, Any]:
    """Return loss, this process's pieces of the gradients and what its queries selected."""
    began_s = time.monotonic()
    parts = build_parts(config, groups)
    set_weights(parts.modules, groups)
    table = PunctuationTable.build(
        ["." if token % 7 == 0 else "a" for token in range(size.vocab)],
        PunctuationMatch.exact,
        PunctuationLanguage.en,
    ).to(groups.device)
    tensor = groups.collection.tp
    kept = KeptBlocks(size, tensor.rank() * config.model.num_kv_heads // tensor.size())
    parts.zero_grad()
    build_s = round(time.monotonic() - began_s, 2)
    step = ForwardStep(config, table, config.attention.train_topk, groups, kept)
    count = config.optim.micro_batch_sequences
    batches = [batch(size, first, count) for first in micro_batch_starts(config, groups, 0)]
    rows = forward_backward(parts, batches, step, forward_only=False)
    loss, _ = mean_loss(parts, rows)
    pieces = [
        (k, shape, where, x.float().cpu()) for k, shape, where, x in _gradient_pieces(parts.modules, groups)
    ]
    return {"loss": loss, "pieces": pieces, "selected": kept.found, "build_s": build_s}


def assemble(ranks: list[dict[str, Any]], size: Size) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return whole gradients, and the blocks int32 [layer, sequence, position, kv head, k], of all pieces."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for key, shape, where, values in rank["pieces"]:
            whole.setdefault(key, torch.full(shape, torch.nan))[where] = values
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"a part of {key} is on no process, or is not a number"
    topk = ranks[0]["selected"][0][-1].shape[-1] if ranks[0]["selected"] else 0
    shape = (4, size.num_sequences, size.seq_len_tokens, size.heads[1], topk)
    blocks = torch.full(shape, -2, dtype=torch.int32)
    for rank in ranks:
        for layer, number, head, own, ids in rank["selected"]:
            blocks[layer - 1, number, own, head : head + ids.shape[1]] = ids
    assert (blocks >= -1).all(), "what some query selected is on no process"
    return whole, blocks


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the L2 norm of the difference over that of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@dataclass(frozen=True)
class References:
    """One process's step: in fp32 by the reference ops, and as the layouts run it."""

    truth: dict[str, torch.Tensor]
    truth_blocks: torch.Tensor
    one: dict[str, torch.Tensor]
    one_blocks: torch.Tensor
    one_loss: float

    @classmethod
    def kept(cls, size: Size, path: Path, groups: KeptGroups) -> References:
        """Return what an earlier start of this session has computed, or compute it."""
        if path.exists():
            return cls(**torch.load(path))
        taken = cls.take(size, groups)
        part = path.with_suffix(".part")
        torch.save(vars(taken), part)
        part.rename(path)
        return taken

    @classmethod
    def take(cls, size: Size, kept: KeptGroups) -> References:
        """Compute both on this process alone."""
        exact = replace(size, dtype=Dtype.fp32, impl=KernelImpl.reference)
        steps = []
        for version in (exact, size):
            config = layout_config(version, 1, {})
            with kept.of(config) as groups:
                assert groups is not None, "the references are process 0's"
                steps.append(take_step(config, groups, version))
        (truth, truth_blocks), (one, one_blocks) = (assemble([step], size) for step in steps)
        return cls(truth, truth_blocks, one, one_blocks, steps[1]["loss"])

    def compare(self, ranks: list[dict[str, Any]], size: Size) -> dict[str, Any]:
        """Return the distances of a layout's step, and `within`: whether all are in their bounds."""
        found, blocks = assemble(ranks, size)
        assert found.keys() == self.truth.keys()
        rows = {
            key: (relative(found[key], truth), relative(self.one[key], truth))
            for key, truth in self.truth.items()
        }
        from_one = [relative(found[key], one) for key, one in self.one.items()]
        worst = max(rows, key=lambda key: rows[key][0] / rows[key][1])
        loss_frac = max(abs(rank["loss"] / self.one_loss - 1) for rank in ranks)
        differ = {"truth": self.truth_blocks, "one": self.one_blocks}
        other_frac = {
            name: float((blocks != truth).any(-1).float().mean()) if blocks.shape == truth.shape else 1.0
            for name, truth in differ.items()
        }
        of_one = float((self.one_blocks != self.truth_blocks).any(-1).float().mean())
        in_gradients = all(mine <= 2 * theirs for mine, theirs in rows.values())
        return {
            "worst_gradient": worst,
            "worst_distance": rows[worst][0],
            "worst_bound": 2 * rows[worst][1],
            "mean_distance": sum(mine for mine, _ in rows.values()) / len(rows),
            "mean_of_one": sum(theirs for _, theirs in rows.values()) / len(rows),
            "mean_from_one": sum(from_one) / len(from_one),
            "worst_from_one": max(from_one),
            "loss_frac": loss_frac,
            "other_blocks_frac": other_frac["truth"],
            "other_blocks_than_one_frac": other_frac["one"],
            "other_blocks_of_one_frac": of_one,
            "within": in_gradients and loss_frac <= LOSS_BOUND_FRAC and other_frac["truth"] <= 2 * of_one,
            "in_gradients": in_gradients,
        }


def run_case(
    name: str, size: Size, processes: int, references: References | None, folder: Path, kept: KeptGroups
) -> dict[str, Any]:
    """Take one layout's step on all processes; process 0 compares and returns what it found.

    `references` is given on process 0 only.
    """
    fault, layout = name.split("-") if "-" in name else ("", name)
    one = layout == "one"
    count, changes = (1, {"attention__train_topk": 1}) if one else (LAYOUTS | BESIDE)[layout]
    config, laps, ranks = layout_config(size, count, changes), Laps(), []
    faults = {"lost_pooled_keys": lost_pooled_keys, "lost_marks": lost_marks}
    with kept.of(config) as groups:
        if groups is None:
            return {}
        laps.end("groups_s")
        with faults.get(fault, nullcontext)():
            mine = take_step(config, groups, size)
        laps.end("step_s")
        torch.save(mine, folder / f"step.{groups.rank}.pt")
        groups.barrier()
        if groups.rank == 0:
            files = [folder / f"step.{rank}.pt" for rank in range(count)]
            ranks = [torch.load(file, weights_only=False) for file in files]
        groups.barrier()  # the next case writes to the same files
    if references is None:
        return {}
    row = references.compare(ranks, size)
    laps.end("compare_s")
    # A control has passed its test if the comparison fails.
    row["passed"] = not row["in_gradients"] if fault else row["within"]
    return row | {"control": fault, "build_s": ranks[0]["build_s"]} | laps.seconds
