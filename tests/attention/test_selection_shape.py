import math

import pytest
import torch

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.selection_shape import NUM_DISTANCES, SelectionShape, shape_sums
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch

BOUNDS = [0, 7, 60, 61, 90, 126, 128]  # the last document is shorter than a block
M, INIT, LOCAL, HEADS, TOPK = 4, 4, 8, 2, 2
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(50)], PunctuationMatch.exact, PunctuationLanguage.en
)


def _info(dense_len=0, seed=0):
    settings = AttentionConfig(
        block_tokens=M, init_tokens=INIT, local_tokens=LOCAL, dense_len_tokens=dense_len
    )
    tokens = torch.randint(0, 50, (1, 128), generator=torch.Generator().manual_seed(seed))
    return SideInfo.build(tokens, torch.tensor(BOUNDS, dtype=torch.int32), TABLE, settings, TOPK)


def _random_ids(info, pick):
    """Blocks that a query may choose, `pick`ed out of its candidates; -1 where there are too few."""
    position, _ = info.positions()
    ids = torch.full((128, HEADS, TOPK), -1, dtype=torch.int32)
    for i, at in enumerate(position.tolist()):
        candidates = list(range(INIT // M, at // M - LOCAL // M + 1))
        for head in range(HEADS):
            for slot, block in enumerate(sorted(pick(candidates, i, head))[:TOPK]):
                ids[i, head, slot] = block
    return ids


def _by_hand(info, ids, dense_len=0):
    marks = info.is_punctuation.flatten().tolist()
    chosen, distances, overlap, wanted, entropies, blocks = [], [], 0, 0, [], []
    for start, end in info.document_bounds():
        if end - start <= dense_len:
            continue
        complete = (end - start) // M
        blocks += [sum(marks[start + b * M : start + b * M + M]) / M for b in range(complete)]
        per_head = [{} for _ in range(HEADS)]
        candidates = max(0, (end - 1 - start) // M - LOCAL // M - INIT // M + 1)
        for i in range(start, end):
            for head in range(HEADS):
                mine = [b for b in ids[i, head].tolist() if b >= 0]
                for b in mine:
                    at = start + b * M
                    chosen.append(sum(marks[at : at + M]) / M)
                    distances.append((i - start) // M - b)
                    per_head[head][at] = per_head[head].get(at, 0) + 1
                before = [b for b in ids[i - 1, head].tolist() if b >= 0] if i > start else []
                if mine and before:
                    overlap += len(set(mine) & set(before))
                    wanted += len(mine)
        for counts in per_head:
            total = sum(counts.values())
            if total and candidates > 1:
                bits = -sum(c / total * math.log(c / total) for c in counts.values())
                entropies.append(bits / math.log(candidates))
    hist = [
        sum(1 for d in distances if 2**n <= d < 2 ** (n + 1)) / len(distances) for n in range(NUM_DISTANCES)
    ]
    return SelectionShape(
        sum(chosen) / len(chosen), sum(distances) / len(distances), overlap / wanted,
        sum(entropies) / len(entropies), sum(blocks) / len(blocks), tuple(hist),
    )  # fmt: skip


def _found(info, ids):
    return SelectionShape.of(shape_sums(ids, *info.positions(), info, max_rows=1000))


@pytest.mark.parametrize("dense_len", [0, 40])
def test_shapes_equal_a_counting_loop(dense_len):
    info, generator = _info(dense_len), torch.Generator().manual_seed(1)

    def pick(candidates, i, head):
        order = torch.randperm(len(candidates), generator=generator).tolist()
        return [candidates[j] for j in order[:TOPK]]

    ids = _random_ids(info, pick)
    found, expected = _found(info, ids), _by_hand(info, ids, dense_len)
    for name, value in vars(expected).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name
    assert 0 < found.neighbour_overlap_frac < 1 and 0 < found.selection_entropy_frac < 1


def test_extremes_are_what_they_are_called():
    info = _info()
    same = _found(info, _random_ids(info, lambda candidates, i, head: candidates[:1]))
    assert same.neighbour_overlap_frac == 1.0
    position, document = info.positions()
    marked = info.is_punctuation.flatten()

    def most_marks(candidates, i, head):
        start = BOUNDS[document[i]]
        return sorted(candidates, key=lambda b: -int(marked[start + b * M : start + b * M + M].sum()))[:1]

    wanted = _found(info, _random_ids(info, most_marks))
    assert wanted.selected_punctuation_frac > wanted.block_punctuation_frac + 0.1
    nothing = _found(info, torch.full((128, HEADS, TOPK), -1, dtype=torch.int32))
    assert math.isnan(nothing.selected_punctuation_frac) and nothing.block_punctuation_frac > 0


def test_sums_of_two_processes_are_those_of_one():
    """Context-parallel processes hold parts of the queries; sums over queries add up."""
    info = _info()
    ids = _random_ids(info, lambda candidates, i, head: candidates[i % 3 :][:TOPK])
    position, document = info.positions()
    whole = shape_sums(ids, position, document, info, 1000)
    halves = [
        shape_sums(ids[part], position[part], document[part], info, 1000)
        for part in (torch.arange(64), torch.arange(64, 128))
    ]
    both = halves[0] + halves[1]
    assert both[:3].tolist() == pytest.approx(whole[:3].tolist())
    assert both[9:].tolist() == whole[9:].tolist()
