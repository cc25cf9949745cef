import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phsa_megatron.attention.information_loss import (
    COLUMNS,
    Information,
    InformationRecorder,
    block_mass,
    information_of_mass,
)
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch

M, T, HEADS, KV, D = 4, 45, 4, 2, 8
SETTINGS = AttentionConfig(block_tokens=M, init_tokens=M, local_tokens=2 * M)


def information_sums(query, keys, ids, position, attention):
    """Of one document."""
    return information_of_mass(block_mass(query, keys, position, attention), ids, position, attention)


def _document(seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(T, h, D, dtype=torch.float64, generator=g) for h in (HEADS, KV))
    position = torch.arange(T)
    ids = torch.full((T, KV, 2), -1, dtype=torch.int32)
    for i in range(T):
        candidates = list(range(1, i // M - 1))
        for head in range(KV):
            picks = torch.randperm(len(candidates), generator=g)[:2].tolist()
            for slot, pick in enumerate(sorted(picks)):
                ids[i, head, slot] = candidates[pick]
    return q, k, ids, position


def _by_loops(q, k, ids):
    """The nine sums of each head, key by key."""
    sums = torch.zeros(HEADS, 9, dtype=torch.float64)
    for i in range(T):
        current = i // M
        candidates = range(1, current - 1)
        mass = torch.zeros(HEADS, current + 1, dtype=torch.float64)
        for head in range(HEADS):
            kv = head * KV // HEADS
            weights = [math.exp(float(q[i, head] @ k[j, kv]) * D**-0.5) for j in range(i + 1)]
            for j, w in enumerate(weights):
                mass[head, j // M] += w / sum(weights)
        for head in range(HEADS):
            kv = head * KV // HEADS
            group = [h for h in range(HEADS) if h * KV // HEADS == kv]
            best = sorted(candidates, key=lambda b: -float(mass[group, b].sum()))[:2]
            chosen = [b for b in ids[i, kv].tolist() if b >= 0]
            window = sum(float(mass[head, b]) for b in range(current + 1) if b < 1 or b > current - 2)
            kept, ideal = (window + sum(float(mass[head, b]) for b in bs) for bs in (chosen, best))
            choice = float(len(candidates) > 2)
            hits = len(set(best) & set(chosen))
            row = [1, kept, window, ideal, *(choice * x for x in (kept, window, ideal, hits, len(best)))]
            sums[head] += torch.tensor(row, dtype=torch.float64)
    return sums


def test_sums_equal_loops_over_keys_and_heads():
    q, k, ids, position = _document()
    found, expected = information_sums(q, k, ids, position, SETTINGS), _by_loops(q, k, ids)
    # Masses are fp32; each sum has 45 terms.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shifted = torch.where(ids > 1, ids - 1, ids)
    assert not torch.allclose(information_sums(q, k, shifted, position, SETTINGS), expected, rtol=1e-3)


def test_the_oracle_recovers_everything_and_nothing_recovers_nothing():
    q, k, ids, position = _document()
    mass = block_mass(q, k, position, SETTINGS)
    shared = mass.view(T, KV, 2, -1).sum(2)
    block = torch.arange(shared.shape[2])
    candidate = (block >= 1) & (block < position[:, None] // M - 1)
    best = shared.masked_fill(~candidate[:, None], -1.0).topk(2, dim=-1)
    oracle = torch.where(best.values >= 0, best.indices, -1).to(torch.int32)
    ideal = Information.of(information_of_mass(mass, oracle, position, SETTINGS).sum(0))
    assert ideal.block_recall_frac == 1 and ideal.oracle_gain_frac == pytest.approx(1)
    assert ideal.kept_mass_frac == ideal.oracle_mass_frac > ideal.window_mass_frac
    none = Information.of(information_of_mass(mass, torch.full_like(oracle, -1), position, SETTINGS).sum(0))
    assert none.block_recall_frac == 0 and none.oracle_gain_frac == pytest.approx(0, abs=1e-9)
    random = Information.of(information_of_mass(mass, ids, position, SETTINGS).sum(0))
    assert 0 < random.oracle_gain_frac < 1


def test_ids_by_query_head_have_an_oracle_by_query_head():
    q, k, ids, position = _document()
    by_group = information_sums(q, k, ids, position, SETTINGS)
    by_head = information_sums(q, k, ids.repeat_interleave(2, 1), position, SETTINGS)
    kept, oracle = COLUMNS.index("kept"), COLUMNS.index("oracle")
    torch.testing.assert_close(by_head[:, kept], by_group[:, kept])
    assert (by_head[:, oracle] >= by_group[:, oracle] - 1e-6).all()
    assert by_head[:, oracle].sum() > by_group[:, oracle].sum() + 0.01


def test_nothing_to_choose_has_no_gain():
    assert math.isnan(Information.of(torch.zeros(9)).oracle_gain_frac)


def test_recorder_samples_documents_alike_and_puts_heads_in_their_place():
    q, k, ids, _ = _document()
    words = ["."] * 10
    table = PunctuationTable.build(words, PunctuationMatch.exact, PunctuationLanguage.en)
    bounds = [0, 20, 20, T]
    info = SideInfo.build(
        torch.zeros(1, T, dtype=torch.int64), torch.tensor(bounds, dtype=torch.int32), table, SETTINGS, 2
    )
    ids = torch.where(ids * M + M <= 12, ids, -1)  # inside of either document's candidates, roughly
    recorder = InformationRecorder(num_layers=3, num_heads=2 * HEADS, first_head=HEADS, max_rows=T)
    recorder.record(2, q, k, k, ids, torch.zeros(T, HEADS), info)
    expected = torch.zeros(HEADS, 9, dtype=torch.float64)
    for start, end in ((0, 20), (20, T)):
        expected += information_sums(
            q[start:end], k[start:end], ids[start:end], torch.arange(end - start), SETTINGS
        )
    torch.testing.assert_close(recorder.sums[1, HEADS:], expected)
    assert not recorder.sums[[0, 2]].any() and not recorder.sums[1, :HEADS].any()
    assert list(recorder.layers()) == [2]
    few = InformationRecorder(3, HEADS, 0, max_rows=9)
    few.record(2, q, k, k, ids, torch.zeros(T, HEADS), info)
    assert few.sums[1, 0, 0] == 9


class _Waits(TorchDispatchMode):
    """Counts operations for which the host waits for a device."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += str(function).startswith(("aten._local_scalar_dense", "aten.nonzero"))
        return function(*args, **(kwargs or {}))


def test_recorder_takes_queries_in_any_order_and_leaves_dense_documents_out():
    """A process under context parallelism has two pieces of the sequence, in any order."""
    q, k, ids, _ = _document()
    settings = replace(SETTINGS, dense_len_tokens=8)
    table = PunctuationTable.build(["."] * 10, PunctuationMatch.exact, PunctuationLanguage.en)
    bounds = torch.tensor([0, 20, 26, T], dtype=torch.int32)
    info = SideInfo.build(torch.zeros(1, T, dtype=torch.int64), bounds, table, settings, 2)
    ids = torch.where(ids * M + M <= 12, ids, -1)
    recorder = InformationRecorder(num_layers=1, num_heads=HEADS, max_rows=T)
    tokens = torch.cat([torch.arange(T // 2, T), torch.arange(T // 2)])
    with _Waits() as waits:
        recorder.record(1, q[tokens], k, k, ids[tokens], torch.zeros(T, HEADS), info, tokens)
    expected = torch.zeros(HEADS, 9, dtype=torch.float64)
    for start, end in ((0, 20), (26, T)):
        expected += information_sums(
            q[start:end], k[start:end], ids[start:end], torch.arange(end - start), settings
        )
    torch.testing.assert_close(recorder.sums[0], expected)
    # For `tokens` alone, and for no document.
    assert waits.num <= 1
    dense = InformationRecorder(num_layers=1, num_heads=HEADS, max_rows=T)
    short = SideInfo.build(
        torch.zeros(1, T, dtype=torch.int64), bounds, table, replace(settings, dense_len_tokens=T), 2
    )
    dense.record(1, q, k, k, ids, torch.zeros(T, HEADS), short)
    assert not dense.sums.any()
