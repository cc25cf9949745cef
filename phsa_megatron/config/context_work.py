"""How much attention work each context-parallel process has, by counting: what sharding does to balance.

    python -m phsa_megatron.config.context_work

prints the table of `docs/layouts.md`. A query scores every complete block before its own and attends to its
windows and chosen blocks; both counts follow from its position and the length of its document alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phsa_megatron.config.flops import causal_pairs, is_dense, scored_pairs, selected_pairs
from phsa_megatron.config.schema import AttentionConfig, ContextSharding
from phsa_megatron.config.sequence_chunks import own_chunks


@dataclass(frozen=True)
class ContextWork:
    """The work of one process in one sequence, for one head of queries.

    Attributes:
        scored_pairs: (query, block) pairs that selection scores.
        attended_pairs: (query, key) pairs that attention computes.
        reachable_tokens: tokens of other processes in blocks that own queries could attend to: the most that
            the block-sparse exchange sends here, whatever is selected.
    """

    scored_pairs: int
    attended_pairs: int
    reachable_tokens: int


def context_work(
    bounds: Sequence[int], attention: AttentionConfig, size: int, sharding: ContextSharding
) -> list[ContextWork]:
    """Return the work of each of `size` context-parallel processes.

    Args:
        bounds: the documents of a sequence: 0, the start of every further one, and the sequence's length, a
            multiple of 2 * size.
        attention: its settings; `train_topk` blocks are selected.
        size: context-parallel processes.
        sharding: which chunks a process holds.
    """
    chunk = bounds[-1] // (2 * size)
    return [
        _work_of([(n * chunk, (n + 1) * chunk) for n in own_chunks(size, rank, sharding)], bounds, attention)
        for rank in range(size)
    ]


def _work_of(
    pieces: Sequence[tuple[int, int]], bounds: Sequence[int], attention: AttentionConfig
) -> ContextWork:
    """Return the work of the queries in `pieces` of a sequence, each (first, past the last)."""
    # A document's first queries do not attend densely because they are few.
    sparse = replace(attention, dense_len_tokens=0)
    scored = attended = reachable = 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        dense = is_dense(end - start, attention)
        own = [(max(start, a), min(end, b)) for a, b in pieces if max(start, a) < min(end, b)]
        if own:
            m = attention.block_tokens
            last_block_end = start - (start - own[-1][1]) // m * m
            before = [min(b, last_block_end) - a for a, b in own]
            reachable += min(last_block_end, end) - start - sum(before)
        for piece_start, piece_end in pieces:
            first, last = max(start, piece_start) - start, min(end, piece_end) - start
            if first >= last:
                continue
            if dense:
                attended += causal_pairs(last) - causal_pairs(first)
            else:
                topk = attention.train_topk
                attended += selected_pairs(last, sparse, topk) - selected_pairs(first, sparse, topk)
                scored += scored_pairs(last, sparse) - scored_pairs(first, sparse)
    return ContextWork(scored, attended, reachable)


def table() -> str:
    """Return, as Markdown, the most work of a process over the mean, for both shardings.

    And the reachable tokens of the process with most of them, over what an all-gather brings.
    """
    lines = [
        "| tokens | documents | CP | sharding | scored pairs, most / mean | attended pairs, most / mean | "
        "reachable / all-gather, most |",
        "|---|---|---|---|---|---|---|",
    ]
    attention = AttentionConfig(init_tokens=128, local_tokens=512)
    for length, size in ((32768, 4), (131072, 8)):
        for name, bounds in _packings(length).items():
            for sharding in ContextSharding:
                work = context_work(bounds, attention, size, sharding)
                ratios = [
                    max(values) * size / sum(values)
                    for values in ([w.scored_pairs for w in work], [w.attended_pairs for w in work])
                ]
                reachable = max(w.reachable_tokens for w in work) / (length - length // size)
                ratios.append(reachable)
                lines.append(
                    f"| {length:,} | {name} | {size} | {sharding.value} | "
                    + " | ".join(f"{ratio:.2f}" for ratio in ratios)
                    + " |"
                )
    return "\n".join(lines)


def _packings(length: int) -> dict[str, list[int]]:
    """Return documents of a sequence, by what they look like; none but the first is aligned to anything."""
    return {
        "one": [0, length],
        "a half, a quarter, ...": [0, *(length - (length >> n) + 5 for n in range(1, 8)), length],
        "64 alike": [0, *(length * n // 64 + 5 for n in range(1, 64)), length],
    }


if __name__ == "__main__":
    print(table())
