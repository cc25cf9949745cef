"""Every process's own queries against all keys, compared with one process; processes are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from phsa_kernels.api import pool
from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.selection_stats import SelectionRecorder
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import (
    AttentionConfig,
    ContextExchange,
    ContextSharding,
    ParallelConfig,
    PunctuationLanguage,
    PunctuationMatch,
)
from phsa_megatron.parallel import exchange
from phsa_megatron.parallel.exchange import ContextGroups
from phsa_megatron.parallel.sequence_sharding import own_part, own_positions

S, B, HEADS, KV_HEADS, D = 96, 2, 6, 2, 8
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)
# At CP = 4 and blocks of 4, chunks are 12 tokens: blocks of the second list straddle nearly every one.
DOCUMENTS = {
    "aligned": [0, 96, 192],
    "straddling": [0, 3, 96, 97, 131, 192, 192],
    "many short": [0, 1, 6, 9, 13, 30, 31, 54, 55, 81, 96, 98, 111, 125, 143, 149, 166, 177, 192],
    "no complete block": [*range(0, 192, 3), 192],
}


class ThreadGroup:
    """Looks like a process group to one thread of several; members are ranks of all threads."""

    def __init__(self, thread, members, meetings):
        self._thread, self._members, self._meetings = thread, members, meetings

    def rank(self):
        return self._members.index(self._thread)

    def size(self):
        return len(self._members)

    def exchange(self, tensor):
        barrier, slots = self._meetings[self._members]
        slots[self._thread] = tensor
        barrier.wait()
        everyone = [slots[member] for member in self._members]
        barrier.wait()
        return everyone


@pytest.fixture(autouse=True)
def sent(monkeypatch):
    """Lets threads take the part of processes in torch's collectives; returns what was sent, by members."""
    sent_bytes = {}

    def count(group, tensor):
        place = (group._thread, group._members)
        sent_bytes[place] = sent_bytes.get(place, 0) + tensor.numel() * tensor.element_size()

    def gather(received, tensor, group, async_op):
        received.copy_(torch.cat(group.exchange(tensor)))
        count(group, received[len(tensor) :])
        return SimpleNamespace(wait=lambda: None)

    def reduce(result, tensor, group, async_op=False):
        parts = [other.view(group.size(), -1)[group.rank()] for other in group.exchange(tensor)]
        result.copy_(torch.stack(parts).sum(0))
        count(group, tensor[len(result) :])

    def all_to_all(received, tensor, num_received, num_sent, group):
        parts = group.exchange(tensor.split(num_sent))
        mine = [part[group.rank()] for part in parts]
        assert [len(part) for part in mine] == num_received
        received.copy_(torch.cat(mine))
        for process, part in enumerate(tensor.split(num_sent)):
            if process != group.rank():
                count(group, part)

    # Threads pass each part of a collective at once: there is nothing to wait for at its end.
    together = nullcontext(SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr(exchange, "_coalescing_manager", lambda group, async_ops: together)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", reduce)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", all_to_all)
    return sent_bytes


def on_all(size, work, node_size=None):
    """Returns what `work(groups)` gives on each of `size` processes; a failure of one ends the others."""
    everyone = tuple(range(size))
    nodes = [everyone[n : n + node_size] for n in range(0, size, node_size)] if node_size else []
    places = list(zip(*nodes, strict=True))
    meetings = {
        members: (threading.Barrier(len(members), timeout=30), {}) for members in [everyone, *nodes, *places]
    }

    def run(thread):
        levels = [
            ThreadGroup(thread, next(members for members in level if thread in members), meetings)
            for level in (nodes, places)
            if level
        ]
        try:
            whole = ThreadGroup(thread, everyone, meetings)
            return work(SimpleNamespace(cp=whole, hcp=levels))
        except BaseException:
            for barrier, _ in meetings.values():
                barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool_of_threads:
        return list(pool_of_threads.map(run, range(size)))


def _settings(**changes):
    return AttentionConfig(**{"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, **changes})


def _info(bounds, settings, recorder=None, rows=B):
    tokens = torch.randint(0, 50, (rows, B * S // rows), generator=torch.Generator().manual_seed(0))
    return SideInfo.build(
        tokens, torch.tensor(bounds, dtype=torch.int32), TABLE, settings, topk=2, recorder=recorder
    )


def _attention(cls, settings, collection=None, parallel=None):
    size = collection.cp.size() if collection else 1
    config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=size)
    kwargs = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", "parallel": parallel}
    return cls(config, 1, attention=settings, pg_collection=collection, **kwargs)


def _qkv(dtype=torch.float64, rows=B):
    generator = torch.Generator().manual_seed(0)  # not the global one: several threads ask
    shapes = [(B * S // rows, rows, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class KeepsIds:
    """Keeps what was selected, with the tokens that selected it."""

    def record(self, layer_number, query, key, value, ids, lse, side_info, tokens=None, block_slot=None):
        self.ids, self.tokens, self.block_slot = ids, tokens, block_slot


def _run(cls, settings, bounds, upstream, collection=None, recorder=None, parallel=None):
    """Returns (output, gradients of q, k, v, recorder) on one process: all tokens, or its own."""
    group, parallel = collection and collection.cp, parallel or ParallelConfig()
    tokens, rows = upstream.shape[:2]
    whole, size, rank = _qkv(rows=rows), group.size() if group else 1, group.rank() if group else 0
    own = own_positions(tokens, size, rank, parallel.context_sharding)
    inputs = [x[own].requires_grad_() for x in whole]
    recorder = recorder or KeepsIds()
    info = _info(bounds, settings, recorder, rows)
    out = _attention(cls, settings, collection, parallel)(*inputs, None, packed_seq_params=info)
    grads = torch.autograd.grad(out, inputs, upstream[own])
    return out, grads, recorder


# Sharding, exchange, and processes of a node.
WAYS = {
    "all_gather": (),
    "block_sparse": ("block_sparse",),
    "auto": ("auto",),
    "contiguous": ("all_gather", "contiguous"),
    "contiguous_block_sparse": ("block_sparse", "contiguous"),
    "nodes": ("all_gather", "zigzag", 2),
    "nodes_block_sparse": ("block_sparse", "zigzag", 2),
    "nodes_auto": ("auto", "contiguous", 2),
}


def _parallel(exchange="all_gather", sharding="zigzag", node_size=None):
    return ParallelConfig(
        context_exchange=ContextExchange(exchange),
        context_sharding=ContextSharding(sharding),
        context_node_size=node_size,
    )


CASES = [
    (cls, size, way)
    for cls in (PHSACoreAttention, DenseCoreAttention)
    for way in WAYS
    for size in (2, 3, 4, 6)
    if (size in (4, 6) if way.startswith("nodes") else size < 6)
    and not (cls is DenseCoreAttention and ("sparse" in way or "auto" in way))
]


@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize(("cls", "size", "way"), CASES)
def test_output_gradients_and_selection_equal_one_process(cls, bounds, rows, size, way):
    """One row of both sequences' tokens, whose keys are gathered to where they belong, or two of one each."""
    settings, parallel = _settings(dense_len_tokens=10), _parallel(*WAYS[way])
    upstream = torch.randn(B * S // rows, rows, HEADS * D, dtype=torch.float64)
    expected, expected_grads, kept = _run(cls, settings, bounds, upstream)
    ranks = on_all(
        size,
        lambda group: _run(cls, settings, bounds, upstream, group, parallel=parallel),
        parallel.context_node_size,
    )
    for rank, (out, grads, recorder) in enumerate(ranks):
        own = own_positions(len(upstream), size, rank, parallel.context_sharding)
        torch.testing.assert_close(out, expected[own], rtol=1e-12, atol=1e-12)
        for found, one in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(found, one[own], rtol=1e-11, atol=1e-12)
        if cls is PHSACoreAttention:
            assert torch.equal(recorder.ids, kept.ids[recorder.tokens])
            if recorder.block_slot is not None:  # the Triton kernels' backward refuses a slot named twice
                here = recorder.block_slot[recorder.block_slot >= 0]
                assert len(here.unique()) == len(here)


def test_parts_that_pass_two_levels_are_not_gathered_to_their_places():
    """They arrive by places, not by processes: taken for those of one level they would be out of order."""

    def refused(collection):
        groups = ContextGroups.of(collection)
        x = torch.zeros(4, 2)
        with pytest.raises(ValueError, match="two levels"):
            exchange.start_all_gather_to([x], lambda: exchange.Landing((), (x,)), groups)
        with pytest.raises(ValueError, match="use reduce_scatter"):
            exchange.reduce_scatter_from([x], [x], groups)
        return True

    assert on_all(4, refused, node_size=2) == [True] * 4


def _sent_bytes(sent, way, bounds, size=4):
    """Returns what one forward and backward pass sends on all processes: (in all, across nodes)."""
    sent.clear()
    parallel = _parallel(*WAYS[way])
    upstream = torch.ones(S, B, HEADS * D, dtype=torch.float64)
    args = (PHSACoreAttention, _settings(), DOCUMENTS[bounds], upstream)
    node_size = parallel.context_node_size
    on_all(size, lambda group: _run(*args, group, parallel=parallel), node_size)
    places = [(i, i + node_size) for i in range(node_size)] if node_size else []
    across = sum(n for (_, members), n in sent.items() if members in places)
    return sum(sent.values()), across


def test_every_key_crosses_to_the_other_node_once(sent):
    flat, _ = _sent_bytes(sent, "all_gather", "straddling")
    total, across = _sent_bytes(sent, "nodes", "straddling")
    # Two of the three others are on the other node; one of three copies goes there.
    assert total == flat == 3 * across


def test_needed_blocks_cross_no_more_often_than_all_keys_and_stay_at_home_with_their_documents(sent):
    everything, crossing = _sent_bytes(sent, "nodes", "many short")
    blocks, crossing_blocks = _sent_bytes(sent, "nodes_block_sparse", "many short")
    assert 0 < crossing_blocks < crossing / 2 and blocks < everything / 2
    contiguous, _ = _sent_bytes(sent, "contiguous_block_sparse", "many short")
    flat, _ = _sent_bytes(sent, "block_sparse", "many short")
    assert contiguous < flat, "a document lies on fewer processes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "block_tokens"), [(2, 1), (2, 4), (4, 4), (3, 16), (4, 12)])
def test_pooled_keys_equal_one_process_bit_for_bit_wherever_documents_start(size, block_tokens, dtype):
    settings = _settings(block_tokens=block_tokens)
    key = _qkv(dtype)[1]
    flat = key.transpose(0, 1).reshape(B * S, KV_HEADS, D)
    generator = torch.Generator().manual_seed(size * block_tokens)
    straddling = 0
    for _ in range(20):
        cuts = torch.randperm(B * S, generator=generator)[: int(torch.randint(0, 12, (1,)))]
        bounds = sorted({0, S, B * S, *cuts.tolist()})
        info = _info(bounds, settings)
        expected = pool(flat, info.pool_weights.flatten(), info.cu_seqlens, block_tokens=block_tokens)
        for start, end in info.document_bounds():
            chunk = S // (2 * size)
            complete = range(start, end - block_tokens + 1, block_tokens)
            straddling += sum(t // chunk != (t + block_tokens - 1) // chunk for t in complete)

        def gathered(collection, info=info):
            groups = ContextGroups.of(collection)
            own = key[own_positions(S, groups.size(), groups.rank())].transpose(0, 1)
            shard = ContextShard(groups, B, S)
            mine = _info(info.cu_seqlens.tolist(), settings)
            return shard.gather_pooled(own.reshape(-1, KV_HEADS, D), mine, settings)

        for found in on_all(size, gathered):
            assert torch.equal(found, expected)
    assert straddling > 20 or block_tokens == 1, "no block straddles two chunks: nothing is shown"


@pytest.mark.parametrize("sharding", ContextSharding)
def test_no_micro_batch_but_the_first_brings_numbers_from_the_host(monkeypatch, sharding):
    """On a GPU that would wait for the device, and stop the recording of a CUDA graph."""
    settings, key = _settings(), _qkv(torch.float32)[1]
    infos = [[_info(DOCUMENTS[name], settings) for _ in range(2)] for name in ("straddling", "many short")]

    def gathered(collection, of_process):
        groups = ContextGroups.of(collection)
        own = key[own_positions(S, 2, groups.rank(), sharding)].transpose(0, 1)
        shard = ContextShard(groups, B, S, sharding)
        return shard.gather_pooled(own.reshape(-1, KV_HEADS, D), of_process[groups.rank()], settings)

    def refused(*_, **__):
        raise AssertionError("a list of the host became a tensor of the device")

    on_all(2, lambda collection: gathered(collection, infos[0]))
    monkeypatch.setattr(torch, "tensor", refused)
    on_all(2, lambda collection: gathered(collection, infos[1]))


def test_without_one_process_its_pooled_keys_selection_differs(monkeypatch):
    """Negative control: what the comparisons above would see."""
    upstream = torch.zeros(S, B, HEADS * D, dtype=torch.float64)
    args = (PHSACoreAttention, _settings(), DOCUMENTS["straddling"], upstream)
    kept = _run(*args)[2]
    whole = ContextShard.gather_pooled

    def incomplete(shard, *arguments):
        pooled = whole(shard, *arguments).clone()
        pooled[shard.chunk_tokens // 4 : 2 * shard.chunk_tokens // 4] = 0.0  # chunk 1 of row 0
        return pooled

    monkeypatch.setattr(ContextShard, "gather_pooled", incomplete)
    ranks = on_all(2, lambda group: _run(*args, group)[2])
    assert any(not torch.equal(rank.ids, kept.ids[rank.tokens]) for rank in ranks)


@pytest.mark.parametrize("way", ["all_gather", "block_sparse"])
@pytest.mark.parametrize("max_rows", [17, 1000])
def test_selection_statistics_of_all_processes_add_up_to_those_of_one(max_rows, way):
    upstream = torch.zeros(S, B, HEADS * D, dtype=torch.float64)
    args = (PHSACoreAttention, _settings(), DOCUMENTS["straddling"], upstream)
    one = _run(*args, recorder=SelectionRecorder(1, max_rows))[2]
    parallel = _parallel(*WAYS[way])
    ranks = on_all(2, lambda group: _run(*args, group, SelectionRecorder(1, max_rows), parallel)[2])
    assert one.sums[0, 0] == min(max_rows, B * S) * HEADS
    torch.testing.assert_close(sum(rank.sums for rank in ranks), one.sums, rtol=1e-12, atol=0)


def test_every_token_is_owned_once_and_work_is_balanced():
    rows = torch.arange(2 * S).view(2, S)
    parts = [own_part(rows, 4, rank) for rank in range(4)]
    assert torch.cat(parts, 1).sort(1).values.equal(rows)
    assert {int(part[0].sum()) for part in parts} == {S * (S - 1) // 2 // 4}, "as many causal keys each"
    with pytest.raises(ValueError, match="96 tokens do not divide into 2 x 5 chunks"):
        own_positions(S, 5, 0)


def test_hybrid_context_parallelism_is_refused():
    config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=2, hybrid_context_parallel=True)
    with pytest.raises(ConfigError, match="hybrid_context_parallel is on"):
        PHSACoreAttention(config, 1, AttnMaskType.causal, "self", attention=_settings())
