"""Every process's own queries against all keys, compared with one process; processes are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from phsa_kernels.api import pool
from phsa_megatron.attention import context_parallel
from phsa_megatron.attention.context_parallel import ContextShard
from phsa_megatron.attention.core_attention import DenseCoreAttention, PHSACoreAttention
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.selection_stats import SelectionRecorder
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch
from phsa_megatron.parallel.exchange import Gathering
from phsa_megatron.parallel.zigzag import own_part, own_positions

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
    """Looks like a process group to one thread of several."""

    def __init__(self, rank, size, shared):
        self._rank, self._size, self._shared = rank, size, shared

    def rank(self):
        return self._rank

    def size(self):
        return self._size

    def exchange(self, tensor):
        barrier, slots = self._shared
        slots[self._rank] = tensor
        barrier.wait()
        everyone = [slots[rank] for rank in range(self._size)]
        barrier.wait()
        return everyone


@pytest.fixture(autouse=True)
def exchange_between_threads(monkeypatch):
    def gather(tensor, group):
        everyone = torch.stack(group.exchange(tensor))
        return Gathering(tensor, everyone, SimpleNamespace(wait=lambda: None))

    def reduce(parts, group):
        return torch.stack([other[group.rank()] for other in group.exchange(parts)]).sum(0)

    monkeypatch.setattr(context_parallel, "start_all_gather", gather)
    monkeypatch.setattr(context_parallel, "reduce_scatter", reduce)


def on_all(size, work):
    """Returns what `work(group)` gives on each of `size` processes; a failure of one ends the others."""
    barrier = threading.Barrier(size, timeout=30)
    shared = (barrier, {})

    def run(rank):
        try:
            return work(ThreadGroup(rank, size, shared))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool_of_threads:
        return list(pool_of_threads.map(run, range(size)))


def _settings(**changes):
    return AttentionConfig(**{"block_tokens": 4, "init_tokens": 4, "local_tokens": 8, **changes})


def _info(bounds, settings, recorder=None):
    tokens = torch.randint(0, 50, (B, S), generator=torch.Generator().manual_seed(0))
    return SideInfo.build(
        tokens, torch.tensor(bounds, dtype=torch.int32), TABLE, settings, topk=2, recorder=recorder
    )


def _attention(cls, settings, group=None):
    config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=group.size() if group else 1)
    kwargs = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return cls(config, 1, attention=settings, pg_collection=SimpleNamespace(cp=group), **kwargs)


def _qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)  # not the global one: several threads ask
    shapes = [(S, B, heads, D) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


class KeepsIds:
    """Keeps what was selected, with the tokens that selected it."""

    def record(self, layer_number, query, key, value, ids, lse, side_info, tokens=None):
        self.ids, self.tokens = ids, tokens


def _run(cls, settings, bounds, upstream, group=None, recorder=None):
    """Returns (output, gradients of q, k, v, recorder) on one process: all tokens, or its own."""
    whole, size, rank = _qkv(), group.size() if group else 1, group.rank() if group else 0
    own = own_positions(S, size, rank)
    inputs = [x[own].requires_grad_() for x in whole]
    recorder = recorder or KeepsIds()
    info = _info(bounds, settings, recorder)
    out = _attention(cls, settings, group)(*inputs, None, packed_seq_params=info)
    grads = torch.autograd.grad(out, inputs, upstream[own])
    return out, grads, recorder


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("cls", [PHSACoreAttention, DenseCoreAttention])
def test_output_gradients_and_selection_equal_one_process(cls, bounds, size):
    settings = _settings(dense_len_tokens=10)
    upstream = torch.randn(S, B, HEADS * D, dtype=torch.float64)
    expected, expected_grads, kept = _run(cls, settings, bounds, upstream)
    ranks = on_all(size, lambda group: _run(cls, settings, bounds, upstream, group))
    for rank, (out, grads, recorder) in enumerate(ranks):
        own = own_positions(S, size, rank)
        torch.testing.assert_close(out, expected[own], rtol=1e-12, atol=1e-12)
        for found, one in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(found, one[own], rtol=1e-11, atol=1e-12)
        if cls is PHSACoreAttention:
            assert torch.equal(recorder.ids, kept.ids[recorder.tokens])


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

        def gathered(group, info=info):
            own = key[own_positions(S, group.size(), group.rank())].transpose(0, 1)
            shard = ContextShard(group, B, S)
            mine = _info(info.cu_seqlens.tolist(), settings)
            return shard.gather_pooled(own.reshape(-1, KV_HEADS, D), mine, settings)

        for found in on_all(size, gathered):
            assert torch.equal(found, expected)
    assert straddling > 20 or block_tokens == 1, "no block straddles two chunks: nothing is shown"


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


@pytest.mark.parametrize("max_rows", [17, 1000])
def test_selection_statistics_of_all_processes_add_up_to_those_of_one(max_rows):
    upstream = torch.zeros(S, B, HEADS * D, dtype=torch.float64)
    args = (PHSACoreAttention, _settings(), DOCUMENTS["straddling"], upstream)
    one = _run(*args, recorder=SelectionRecorder(1, max_rows))[2]
    ranks = on_all(2, lambda group: _run(*args, group, SelectionRecorder(1, max_rows))[2])
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
