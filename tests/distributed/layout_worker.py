"""One process of a run that takes a training step's gradients under several layouts, one after the other.

`main(job_file, out_dir)` runs in every process; `job_file` is a torch file with [(name, TrainConfig), ...].
Every layout starts from the same weights, which are a function of each tensor's global name and shape, and
sees the same global batch. For each layout every rank writes its pieces of every gradient, the blocks that it
selected, and the bytes that its context-parallel group sent. A name that begins with `broken` loses one
process's pooled keys, one that begins with `unmarked` the marks of the blocks that one process selected.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from phsa_megatron.parallel import cpu_shim

cpu_shim.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from phsa_megatron.attention.added_losses import AddedLosses  # noqa: E402
from phsa_megatron.attention.block_exchange import BlockExchange, BlockMap  # noqa: E402
from phsa_megatron.attention.context_parallel import ContextShard  # noqa: E402
from phsa_megatron.attention.max_logit import MaxLogitRecorder  # noqa: E402
from phsa_megatron.attention.punctuation import PunctuationTable  # noqa: E402
from phsa_megatron.attention.selection_stats import SelectionRecorder  # noqa: E402
from phsa_megatron.attention.side_info import SideInfo  # noqa: E402
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch, TrainConfig  # noqa: E402
from phsa_megatron.inference.generate import generate  # noqa: E402
from phsa_megatron.model.factory import build_model  # noqa: E402
from phsa_megatron.parallel.exchange import ContextGroups, traffic  # noqa: E402
from phsa_megatron.parallel.groups import Groups, initialize  # noqa: E402

SEQ_LEN_TOKENS = 64
NUM_SEQUENCES = 4
TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)


def sequence(number: int) -> tuple[torch.Tensor, list[int]]:
    """Return tokens int64 [S] of a sequence of the global batch and its document boundaries.

    With blocks of 4 and chunks of 16 or 8 tokens, second documents start off every boundary of either.
    """
    generator = torch.Generator().manual_seed(100 + number)
    tokens = torch.randint(0, 100, (SEQ_LEN_TOKENS,), generator=generator)
    cut = int(torch.randint(0, SEQ_LEN_TOKENS // 4, (1,), generator=generator)) * 4 + 1 + number % 3
    return tokens, [0, cut, SEQ_LEN_TOKENS]


def smallest_score_gap_frac(query: torch.Tensor, key: torch.Tensor, info: SideInfo) -> float:
    """Return by which share of itself the last chosen score is above the best one left out, at the least."""
    settings, (position, _) = info.attention, info.positions()
    m, smallest = settings.block_tokens, float("inf")
    weighted = key * info.pool_weights.view(-1, 1, 1)
    for start, end in info.document_bounds():
        complete = (end - start) // m
        pooled = weighted[start : start + complete * m].unflatten(0, (complete, m)).sum(1)
        current = (position[start:end] // m)[:, None, None]
        block = torch.arange(complete)
        heads = query[start:end].unflatten(1, (key.shape[1], -1))  # [n, Hkv, R, D]
        dots = torch.einsum("nhrd,bhd->nhrb", heads, pooled) * query.shape[2] ** -0.5
        scores = dots.masked_fill(block >= current[..., None], -torch.inf).softmax(-1).sum(2)
        candidate = (block >= settings.init_tokens // m) & (block <= current - settings.local_tokens // m)
        best = scores.masked_fill(~candidate, -torch.inf).topk(min(complete, info.topk + 1), -1).values
        if complete > info.topk:
            chosen, left_out = best[..., -2], best[..., -1]
            gaps = ((chosen - left_out) / chosen)[left_out > -torch.inf]
            smallest = min([smallest, *gaps.tolist()])
    return smallest


class KeepingRecorder(SelectionRecorder):
    """Sums up, and keeps what each query selected: {(layer, sequence, position, key-value head): blocks}."""

    def __init__(self, num_layers: int, first_head: int) -> None:
        super().__init__(num_layers)
        self.first_head = first_head
        self.selected: dict[tuple[int, int, int, int], tuple[int, ...]] = {}
        self.score_gap_frac = float("inf")
        self._numbers = {sequence(n)[0].numpy().tobytes(): n for n in range(NUM_SEQUENCES)}

    def record(self, layer_number: int, *args: Any, **kwargs: Any) -> None:
        """Take one layer's selection; see SelectionListener."""
        super().record(layer_number, *args, **kwargs)
        query, key, _, ids, _, side_info, *rest = args
        own = rest[0] if rest else None
        if own is None:
            gap = smallest_score_gap_frac(query.detach().float(), key.detach().float(), side_info)
            self.score_gap_frac = min(self.score_gap_frac, gap)
        tokens = range(len(ids)) if own is None else own.tolist()
        # Layers may see the rows of a micro-batch as one.
        rows = side_info.token_ids.view(-1, SEQ_LEN_TOKENS)
        numbers = [self._numbers[row.numpy().tobytes()] for row in rows]
        for token, heads in zip(tokens, ids.tolist(), strict=True):
            row, position = divmod(token, SEQ_LEN_TOKENS)
            for head, blocks in enumerate(heads):
                place = (layer_number, numbers[row], position, self.first_head + head)
                # Recomputation records again, and has to select the same.
                assert self.selected.setdefault(place, tuple(blocks)) == tuple(blocks), place


@contextmanager
def counted_bytes(groups: ContextGroups) -> Iterator[dict[tuple[str, str], int]]:
    """Count what this process sends to others of its context group through torch's collectives.

    By collective and by whether they are on other nodes ("across"), on this one or on any ("inside").
    """
    names = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    counts = {(name, level): 0 for name in names for level in ("across", "inside")}
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(output: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if group in groups.levels():
                level = "across" if group is groups.across else "inside"
                if name == "all_to_all_single":
                    (_, num_sent), row = args, tensor[:1].numel()
                    sent = (sum(num_sent) - num_sent[group.rank()]) * row
                else:
                    sent = min(output.numel(), tensor.numel()) * (group.size() - 1)
                counts[name, level] += sent * tensor.element_size()
            return originals[name](output, tensor, *args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def lost_marks() -> Iterator[None]:
    """The process with the ends of the sequences asks for its windows only: what the comparison must see.

    Its queries select among all blocks of a last document, and other processes own most of those. Processes
    from the middle of zigzag may own, or have in their windows, every block that their queries can select.
    """
    whole = BlockExchange.__init__

    def incomplete(exchange: BlockExchange, groups: Any, blocks: BlockMap, ids: torch.Tensor) -> None:
        has_ends = bool(blocks.tokens[groups.rank()].max() == blocks.tokens.max())
        whole(exchange, groups, blocks, torch.full_like(ids, -1) if has_ends else ids)

    BlockExchange.__init__ = incomplete  # type: ignore[method-assign]
    try:
        yield
    finally:
        BlockExchange.__init__ = whole  # type: ignore[method-assign]


@contextmanager
def lost_pooled_keys() -> Iterator[None]:
    """The last context-parallel process's pooled keys arrive as zeros: what the comparison must see."""
    whole = ContextShard.gather_pooled

    def incomplete(shard: ContextShard, key: Any, side_info: Any, settings: Any) -> torch.Tensor:
        if shard.groups.rank() == shard.groups.size() - 1:
            key = torch.zeros_like(key)
        return whole(shard, key, side_info, settings)

    ContextShard.gather_pooled = incomplete  # type: ignore[method-assign]
    try:
        yield
    finally:
        ContextShard.gather_pooled = whole  # type: ignore[method-assign]


def sharded_tensors(chunks: list[Any], groups: Groups) -> list[ShardedTensor]:
    """Return every weight of this process with its place in the whole model."""
    found: list[ShardedTensor] = []

    def walk(node: Any) -> None:
        if isinstance(node, ShardedTensor):
            found.append(node)
        elif isinstance(node, dict):
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.collection.dp_cp})
        apply_factories(state)
        walk(state)
    return found


def place(piece: ShardedTensor) -> tuple[slice, ...]:
    """Return where a piece lies in its whole tensor, leading layer axis included."""
    sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return tuple(slice(start, start + size) for start, size in zip(piece.global_offset, sizes, strict=True))


@torch.no_grad()
def set_weights(chunks: list[Any], groups: Groups) -> None:
    """Fill every weight from its global name: the same model in every layout."""
    for piece in sharded_tensors(chunks, groups):
        generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))
        whole = torch.randn(piece.global_shape, generator=generator)
        whole = 1.0 + 0.1 * whole if "norm" in piece.key else 0.1 * whole
        piece.data.copy_(whole[place(piece)].reshape(piece.data.shape))


def take_gradients(config: TrainConfig, groups: Groups) -> dict[str, Any]:
    """Run one step's forward and backward passes; return the loss and this rank's pieces of the gradients."""
    chunks: list[Any] = build_model(config, groups)
    set_weights(chunks, groups)
    megatron_config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    model = [
        DistributedDataParallel(megatron_config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    megatron_config.finalize_model_grads_func = finalize_model_grads
    micro, share = config.optim.micro_batch_sequences, NUM_SEQUENCES // groups.data_size
    first = groups.data_rank * share
    sums = torch.zeros(2, dtype=torch.float64)
    tensor_group = groups.collection.tp
    first_head = tensor_group.rank() * config.model.num_kv_heads // tensor_group.size()
    recorder = KeepingRecorder(config.model.num_layers, first_head)
    losses = AddedLosses.of(config)
    # All rows: how sequences lie in micro-batches must not change what is looked at.
    logits = MaxLogitRecorder(config.model.num_layers, groups.device, NUM_SEQUENCES * SEQ_LEN_TOKENS)

    def batches() -> Any:
        for start in range(first, first + share, micro):
            rows = [sequence(number) for number in range(start, start + micro)]
            bounds = [row * SEQ_LEN_TOKENS + b for row, (_, cuts) in enumerate(rows) for b in cuts[:2]]
            cu_seqlens = torch.tensor([*bounds, micro * SEQ_LEN_TOKENS], dtype=torch.int32)
            yield torch.stack([tokens for tokens, _ in rows]), cu_seqlens

    def forward_step(iterator: Any, chunk: Any) -> Any:
        tokens, cu_seqlens = next(iterator)
        topk = config.attention.train_topk
        info = SideInfo.build(
            tokens, cu_seqlens, TABLE, config.attention, topk, recorder, losses=losses, logits=logits
        )
        positions = torch.arange(SEQ_LEN_TOKENS).expand_as(tokens)
        whole_mask = torch.ones(tokens.shape)
        whole_mask[:, -1] = 0.0
        part = groups.own_part
        out = chunk(
            part(tokens),
            part(positions),
            None,
            labels=part(tokens.roll(-1, 1)),
            loss_mask=part(info.mtp_loss_mask(whole_mask, config.model.mtp_num_layers)),
            packed_seq_params=info,
        )
        mask = part(whole_mask)

        def loss(output: torch.Tensor) -> Any:
            total = (output.view_as(mask) * mask).sum()
            sums.add_(torch.tensor([total.item(), mask.sum().item()], dtype=torch.float64))
            return total, mask.sum().int(), {}

        return out, loss

    for chunk in model:
        chunk.zero_grad_buffer()
    traffic.take()
    with counted_bytes(ContextGroups.of(groups.collection)) as sent_bytes:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[batches() for _ in model],
            model=model,
            num_microbatches=share // micro,
            seq_length=SEQ_LEN_TOKENS,
            micro_batch_size=micro,
            forward_only=False,
        )
    reported_bytes = traffic.take()
    pieces = _gradient_pieces(chunks, groups)
    totals = groups.sum_over_data(groups.from_last_stage(sums))
    return {
        "loss": (totals[0] / totals[1]).item(),
        "pieces": pieces,
        "added": None if losses is None else groups.sum_over_world(losses.sums(groups.device)),
        "own_logits": logits.maxima,
        "logits": groups.max_over_world(logits.maxima),
        "selection": groups.sum_over_world(recorder.sums),
        "selected": recorder.selected,
        "score_gap_frac": recorder.score_gap_frac,
        "sent_bytes": sent_bytes,
        "reported_bytes": reported_bytes,
        "context_rank": groups.context_rank,
        # Processes that differ in their context rank only.
        "context_peers": tuple(dist.get_process_group_ranks(groups.collection.cp)),
        "sample": generate(
            model,
            [3, 14, 15, 92],
            3,
            config=config,
            groups=groups,
            table=TABLE,
            vocab_size=100,
        ),
    }


@torch.no_grad()
def _gradient_pieces(
    chunks: list[Any], groups: Groups
) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Return (global name, global shape, place, values) of this rank's gradients; weights are put back."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    # A gradient in the place of its weight has the weight's name and place in the whole model.
    for parameter in parameters:
        parameter.copy_(parameter.main_grad)
    pieces = [
        (
            piece.key,
            tuple(piece.global_shape),
            place(piece),
            piece.data.clone().reshape((1,) * piece.prepend_axis_num + tuple(piece.local_shape)),
        )
        for piece in sharded_tensors(chunks, groups)
    ]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
    return pieces


def main(job_file: str, out_dir: str) -> None:
    """Take the gradients of every layout of the job and write them."""
    torch.set_num_threads(1)
    faults = {"broken": lost_pooled_keys, "unmarked": lost_marks}
    rank = os.environ.get("RANK", "0")
    for name, config in torch.load(job_file, weights_only=False):
        groups = initialize(config)
        with faults.get(name.split("-")[0], nullcontext)():
            found = take_gradients(config, groups)
        torch.save(found, os.path.join(out_dir, f"{name}.{rank}.pt"))
        groups.barrier()
        groups.close()
