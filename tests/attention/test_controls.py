import torch

from phsa_megatron.attention.controls import branch_flags, random_flags, weights_of_flags
from phsa_megatron.attention.punctuation import SEPLLM_SEPARATORS, PunctuationTable, table_of
from phsa_megatron.config.schema import (
    AttentionConfig,
    PunctuationLanguage,
    PunctuationMatch,
    Selector,
)

M = 8
CU = torch.tensor([0, 20, 20, 61, 96], dtype=torch.int32)


def _text(seed=0, num_tokens=96):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (num_tokens,), generator=g), torch.rand(num_tokens, generator=g) < 0.25


def _blocks(cu=CU):
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for b in range(start, end, M):
            yield slice(b, min(b + M, end))


def test_random_tokens_are_as_many_in_each_block_and_others():
    ids, flags = _text()
    drawn = random_flags(flags, ids, CU, block_tokens=M, seed=0)
    counts = [(int(flags[b].sum()), int(drawn[b].sum())) for b in _blocks()]
    assert all(wanted == found for wanted, found in counts) and len({n for n, _ in counts}) > 2
    assert not torch.equal(drawn, flags)
    assert not torch.equal(drawn, random_flags(flags, ids, CU, block_tokens=M, seed=1))


def test_random_tokens_are_drawn_evenly_over_a_block():
    tokens = torch.arange(4000) % 97
    cu = torch.tensor([0, 4000], dtype=torch.int32)
    flags = torch.arange(4000) % M == 0  # one a block, always the first
    drawn = random_flags(flags, tokens, cu, block_tokens=M, seed=3).view(-1, M)
    assert (drawn.sum(1) == 1).all()
    share = drawn.double().mean(0)
    # 500 blocks: a share of 1/8 has a standard deviation of 0.015.
    assert ((share - 1 / M).abs() < 0.06).all()


def test_random_tokens_do_not_depend_on_packing_or_on_later_tokens():
    ids, flags = _text()
    whole = random_flags(flags, ids, CU, block_tokens=M, seed=0)
    alone = random_flags(
        flags[20:61], ids[20:61], torch.tensor([0, 41], dtype=torch.int32), block_tokens=M, seed=0
    )
    assert torch.equal(whole[20:61], alone)
    ids[60] = 7
    flags[59:61] = ~flags[59:61]
    later = random_flags(flags, ids, CU, block_tokens=M, seed=0)
    assert torch.equal(later[:52], whole[:52]), "blocks before the changed one"


def test_last_token_flags_the_end_of_every_block():
    ids, flags = _text()
    settings = AttentionConfig(block_tokens=M, selector=Selector.last_token)
    found = branch_flags(flags.view(1, -1), ids.view(1, -1), CU, settings).flatten()
    expected = torch.zeros(96, dtype=torch.bool)
    for b in _blocks():
        if b.stop - b.start == M:
            expected[b.stop - 1] = True
    assert torch.equal(found, expected)


def test_other_selectors_leave_the_flags_alone():
    ids, flags = _text()
    for selector in set(Selector) - {Selector.last_token, Selector.random_tokens}:
        settings = AttentionConfig(block_tokens=M, selector=selector)
        assert torch.equal(branch_flags(flags.view(1, -1), ids.view(1, -1), CU, settings)[0], flags)


VOCABULARY = [
    ".",
    ",",
    "!",
    " ",
    "\n",
    "\t",
    "x",
    " the",
    "of",
    "and",
    "to",
    "in",
    "it",
    "we",
    "a1",
    "(",
    ")",
]
VOCABULARY += [f"w{chr(97 + i)}" for i in range(26)]


def test_separators_are_sepllms():
    table = table_of(VOCABULARY, AttentionConfig(selector=Selector.separators))
    found = {t for t, f in zip(VOCABULARY, table.is_punctuation.tolist(), strict=True) if f}
    assert found == {".", ",", "!", " ", "\n", "\t"} == SEPLLM_SEPARATORS & set(VOCABULARY)


def test_shuffled_has_as_many_ids_all_of_them_frequent_words_and_a_name_of_its_own():
    settings = AttentionConfig(selector=Selector.shuffled, control_seed=4)
    table = table_of(VOCABULARY, settings)
    plain = PunctuationTable.build(VOCABULARY, PunctuationMatch.exact, PunctuationLanguage.en)
    assert table.is_punctuation.sum() == plain.is_punctuation.sum() == 5
    assert not (table.is_punctuation & plain.is_punctuation).any()
    chosen = [t for t, f in zip(VOCABULARY, table.is_punctuation.tolist(), strict=True) if f]
    assert all(len(t.strip()) > 1 and t.strip().isalpha() for t in chosen)
    assert table.name == "exact-en-shuffled-4" and table.sha256 != plain.sha256
    settings.control_seed = 5
    assert table_of(VOCABULARY, settings).sha256 != table.sha256


def test_weights_of_one_flag_a_block_sum_to_one():
    flags = torch.zeros(2 * M, 3, dtype=torch.bool)
    flags[[2, 9], :] = True
    weights = weights_of_flags(flags, M, 0.25)
    torch.testing.assert_close(weights.view(2, M, 3).sum(1), torch.ones(2, 3))
    assert weights[2, 0] == 0.25 / M + 0.75
