"""What context-parallel collectives were given, in bytes, against the formulas, for every way of exchange.

Which blocks are exchanged is worked out here from what every query selected, with sets of tokens.
"""

from __future__ import annotations

from collections import Counter

import pytest

from phsa_megatron.config.context_volume import ExchangedTokens, context_volume, volume_across_nodes
from phsa_megatron.config.schema import AttentionKind, ContextExchange
from phsa_megatron.parallel.sequence_sharding import own_positions
from tests.distributed.conftest import case_config
from tests.distributed.layout_matrix import CASES, LAYOUTS, passes
from tests.distributed.layout_worker import NUM_SEQUENCES, SEQ_LEN_TOKENS, sequence

pytestmark = pytest.mark.slow

# The layers of multi-token prediction do not tell what they select. Bytes are worked out by sequence here.
CONTEXT_CASES = [
    case for case in CASES if "cp" in case[0] and "rows2" not in case[0] and "mtp" not in case[1]
]


def _needed(selected, layer: int, number: int, config) -> set[int]:
    """Returns the positions of all blocks that a process's queries attend to in one layer and sequence."""
    attention = config.attention
    m, (_, bounds) = attention.block_tokens, sequence(number)
    positions = set()
    for (at, of, position, _), chosen in selected.items():
        if (at, of) != (layer, number):
            continue
        start = max(b for b in bounds[:2] if b <= position)
        end = min(b for b in bounds if b > position)
        current = (position - start) // m
        local = range(max(0, current - attention.local_tokens // m + 1), current + 1)
        init = range(min(attention.init_tokens // m, current + 1))
        for block in {*local, *init, *(b for b in chosen if b >= 0)}:
            first = start + block * m
            positions |= set(range(first, min(first + m, end)))
    return positions


def _exchanged(selected, owned, layer: int, number: int, config) -> list[tuple[Counter, Counter]]:
    """Returns, for each process of one context group, tokens (sent, received) by level."""
    size = len(owned)
    node_size = config.parallel.context_node_size or size
    needed = [_needed(own, layer, number, config) for own in selected]
    counts = [(Counter(), Counter()) for _ in range(size)]

    def send(source: int, target: int, tokens: set[int], level: str) -> None:
        if source != target:
            counts[source][0][level] += len(tokens)
            counts[target][1][level] += len(tokens)

    nodes = [range(first, first + node_size) for first in range(0, size, node_size)]
    for source in range(size):
        place = source % node_size
        for node in nodes:
            anywhere = set().union(*(needed[process] for process in node))
            send(source, node[place], owned[source] & anywhere, "across")
        home = nodes[source // node_size]
        column = set().union(*(owned[node[place]] for node in nodes))
        for target in home:
            send(source, target, column & needed[target], "inside")
    return counts


def _expected(ranks, config, times: int):
    """Returns, for each rank, the bytes of each collective by level."""
    size, parallel = config.parallel.context_size, config.parallel
    owned = [
        set(own_positions(SEQ_LEN_TOKENS, size, r, parallel.context_sharding).tolist()) for r in range(size)
    ]
    everything = [Counter() for _ in ranks]
    for peers in {rank["context_peers"] for rank in ranks}:
        selected = [ranks[peer]["selected"] for peer in peers]
        for layer, number in sorted({place[:2] for place in selected[0]}):
            exchanged = _exchanged(selected, owned, layer, number, config)
            sparse = _is_sparse(exchanged, config)
            for peer, counts in zip(peers, exchanged, strict=True):
                everything[peer] += _bytes(config, counts if sparse else None, times)
    return everything


def _is_sparse(exchanged, config) -> bool:
    parallel = config.parallel
    if parallel.context_exchange != ContextExchange.auto:
        return parallel.context_exchange == ContextExchange.block_sparse
    node_size = parallel.context_node_size
    level, others = (
        ("across", parallel.context_size // node_size) if node_size else ("inside", parallel.context_size)
    )
    most = max(sent[level] for sent, _ in exchanged)
    return most < (others - 1) * SEQ_LEN_TOKENS // parallel.context_size


def _bytes(config, counts, times: int) -> Counter:
    """Returns the bytes of one layer and micro-batch by (collective, level); `times` forward passes."""
    total = None if counts is None else ExchangedTokens(*(sum(c.values()) for c in counts))
    volumes = {"all": context_volume(config, total)}
    if config.parallel.context_node_size:
        across = None if counts is None else ExchangedTokens(*(c["across"] for c in counts))
        volumes["across"] = volume_across_nodes(config, across)
    found = Counter()
    for level, volume in volumes.items():
        back = "reduce_scatter_tensor" if counts is None else "all_to_all_single"
        keys = "all_gather_into_tensor" if counts is None else "all_to_all_single"
        found["all_gather_into_tensor", level] += times * (
            volume.forward_bytes - volume.keys_and_values_bytes
        )
        found[keys, level] += times * volume.keys_and_values_bytes
        found[back, level] += volume.gradient_bytes
    return found


def _dense_bytes(config, layers_and_micro_batches: int, times: int) -> Counter:
    one = _bytes(config, None, times)
    return Counter({key: layers_and_micro_batches * value for key, value in one.items()})


@pytest.mark.parametrize(("layout", "variant"), CONTEXT_CASES)
def test_the_bytes_that_a_layer_sends_are_those_of_the_formula(results, tiny_config, layout, variant):
    config, ranks = case_config(tiny_config, layout, variant), results[f"{layout}-{variant}"]
    processes = LAYOUTS[layout][0]
    if config.attention.kind == AttentionKind.dense:
        parallel = config.parallel
        copies = processes // parallel.pipeline_size // parallel.context_size // parallel.tensor_size
        rounds = 4 // parallel.pipeline_size * (NUM_SEQUENCES // copies)
        expected = [_dense_bytes(config, rounds, passes(layout)) for _ in ranks]
    else:
        expected = _expected(ranks, config, passes(layout))
    for rank, formula in zip(ranks, expected, strict=True):
        sent = rank["sent_bytes"]
        found = Counter({("across", name): n for (name, level), n in sent.items() if level == "across"})
        for (name, _), n in sent.items():
            found["all", name] += n
        assert +found == +Counter({(level, name): n for (name, level), n in formula.items()})
        assert sum(sent.values()) > 0
        across = sum(n for (_, level), n in sent.items() if level == "across")
        assert rank["reported_bytes"] == (sum(sent.values()), across)


def test_blocks_are_fewer_bytes_than_all_keys_already_here(results):
    """The exchange leaves something out, and `auto` takes blocks in some layers and all keys in others."""
    gathered, sparse, auto = (
        sum(sum(rank["sent_bytes"].values()) for rank in results[f"{layout}-plain"])
        for layout in ("cp4", "cp4_sparse", "cp4_auto")
    )
    assert sparse < auto < gathered
