import itertools

import pytest

from phsa_megatron.config import flops
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, GroupScore, ModelConfig, Selector

QWEN3_0P6B = dict(num_layers=28, hidden_size=1024, ffn_hidden_size=3072, num_query_heads=16, num_kv_heads=8)
QWEN3_8B = dict(num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_query_heads=32, num_kv_heads=8)


def model(**settings: object) -> ModelConfig:
    return ModelConfig(**{"name": "m", "head_dim": 128, "vocab_size": 151936, **QWEN3_0P6B, **settings})


def allowed_keys(i: int, a: AttentionConfig, k: int) -> set[int]:
    """Brute force: the keys a query attends to, with the lowest candidates standing for the best ones."""
    m, cur = a.block_tokens, i // a.block_tokens
    init = {b for b in range(cur + 1) if b < a.init_tokens // m}
    local = {b for b in range(cur + 1) if b > cur - a.local_tokens // m}
    complete = {b for b in range(cur + 1) if (b + 1) * m - 1 < i}
    candidates = sorted(complete - init - local)
    chosen = init | local | set(candidates[:k])
    return {j for j in range(i + 1) if j // m in chosen}


GRID = list(
    itertools.product((1, 5, 16, 33, 64, 97, 200), ((4, 0, 4), (4, 4, 8), (8, 16, 24), (1, 2, 3)), (1, 2, 7))
)


@pytest.mark.parametrize(("length", "windows", "topk"), GRID)
def test_attended_tokens_and_pairs_equal_a_counting_loop(length, windows, topk):
    block, init, local = windows
    a = AttentionConfig(block_tokens=block, init_tokens=init, local_tokens=local)
    counted = [len(allowed_keys(i, a, topk)) for i in range(length)]
    assert [flops.attended_tokens(i, a, topk) for i in range(length)] == counted
    assert flops.selected_pairs(length, a, topk) == sum(counted)
    assert flops.causal_pairs(length) == sum(i + 1 for i in range(length))


@pytest.mark.parametrize(("length", "windows", "topk"), GRID)
def test_scored_pairs_equal_a_counting_loop(length, windows, topk):
    block, init, local = windows
    a = AttentionConfig(block_tokens=block, init_tokens=init, local_tokens=local, train_topk=topk)
    before_current = sum(i // block for i in range(length))
    assert flops.scored_pairs(length, a) == before_current
    a.group_score = GroupScore.raw_sum
    ids = range(-(-length // block))
    candidates = sum(
        1 for i in range(length) for b in ids if init // block <= b <= i // block - local // block
    )
    assert flops.scored_pairs(length, a) == candidates


@pytest.mark.parametrize(("topk", "last", "mean"), [(2, "97.95%", "95.99%"), (16, "97.27%", "94.65%")])
def test_sparsity_at_32k_is_the_method_pages(topk, last, mean):
    a = AttentionConfig(init_tokens=128, local_tokens=512)
    assert f"{flops.last_token_sparsity_frac(32768, a, topk):.2%}" == last
    assert f"{flops.mean_sparsity_frac(32768, a, topk):.2%}" == mean


def test_attention_flops_at_32k_are_the_kernel_pages():
    m, a = model(), AttentionConfig(init_tokens=128, local_tokens=512)
    assert round(flops.attention_flops(flops.causal_pairs(32768), m) / 1e12, 1) == 4.4
    assert round(flops.attention_flops(flops.selected_pairs(32768, a, 16), m) / 1e12, 2) == 0.24
    scoring = 2 * m.head_dim * m.num_query_heads * flops.scored_pairs(32768, a)
    assert round(scoring / 1e12, 3) == 0.137
    assert flops.selection_flops(32768, m, a) == scoring + 2 * 32768 * 8 * 128


def test_raw_sum_scores_once_a_group():
    m, a = model(), AttentionConfig()
    pooling = 2 * 4096 * 8 * 128
    a.group_score = GroupScore.raw_sum
    raw = flops.selection_flops(4096, m, a) - pooling
    assert raw == 2 * 128 * 8 * flops.scored_pairs(4096, a)


@pytest.mark.parametrize(("kind", "dense_len"), [(AttentionKind.dense, 0), (AttentionKind.phsa, 4096)])
def test_dense_attention_costs_the_dense_equivalent(kind, dense_len):
    m, a = model(), AttentionConfig(kind=kind, dense_len_tokens=dense_len)
    p = flops.count_parameters(m, 151936)
    dense = flops.train_flops_per_sequence(4096, m, p, None)
    assert flops.train_flops_per_sequence(4096, m, p, a) == dense
    assert flops.mean_sparsity_frac(4096, a, 2) == flops.last_token_sparsity_frac(4096, a, 2) == 0
    # Negative control: one token more than dense_len is sparse.
    if kind is AttentionKind.phsa:
        longer = flops.train_flops_per_sequence(4097, m, p, None)
        assert flops.train_flops_per_sequence(4097, m, p, a) < longer


def test_a_document_inside_the_windows_attends_to_all_pairs():
    a = AttentionConfig(init_tokens=16, local_tokens=128)
    assert flops.selected_pairs(144, a, 2) == flops.causal_pairs(144)
    assert flops.selected_pairs(400, a, 2) < flops.causal_pairs(400)


def _tensors(m: ModelConfig, vocab: int) -> list[tuple[int, ...]]:
    """Shapes of every trainable tensor, written down layer by layer."""
    q, kv, h = m.num_query_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.hidden_size
    layer = [(h,), (q, h), (kv, h), (kv, h), (h, q), (h,), (m.ffn_hidden_size, h), (m.ffn_hidden_size, h)]
    layer += [(h, m.ffn_hidden_size)] + ([(m.head_dim,), (m.head_dim,)] if m.qk_norm else [])
    depth = [(h, 2 * h), (h,), (h,), (h,), *layer]
    output = [] if m.tie_embeddings else [(vocab, h)]
    return [(vocab, h), *layer * m.num_layers, (h,), *depth * m.mtp_num_layers, *output]


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) == 2 else 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameter_counts_equal_the_sum_over_tensors(tied, mtp, qk_norm):
    m = model(tie_embeddings=tied, mtp_num_layers=mtp, qk_norm=qk_norm)
    tensors = _tensors(m, 151936)
    p = flops.count_parameters(m, 151936)
    assert p.total == sum(map(_numel, tensors))
    # Every matrix multiplies each token once, the output layer once more for each depth; a lookup does not.
    matrices = sum(_numel(t) for t in tensors if len(t) == 2)
    lookups = 151936 * m.hidden_size * (0 if tied else 1)
    assert p.active_in_products == matrices - lookups + mtp * 151936 * m.hidden_size


def test_published_parameter_counts_of_qwen3():
    assert flops.count_parameters(model(), 151936).total == 596_049_920
    big = model(**QWEN3_8B, tie_embeddings=False)
    assert flops.count_parameters(big, 151936).total == 8_190_735_360


@pytest.mark.parametrize(
    ("vocab", "tensor", "padded"), [(151936, 1, 151936), (151936, 2, 152064), (8192, 1, 8192), (129, 1, 256)]
)
def test_padded_vocabulary(vocab, tensor, padded):
    assert flops.padded_vocab_size(model(vocab_size=vocab), tensor) == padded


def ended_windows(i: int, length: int, stride: int) -> int:
    return sum(1 for start in range(0, i + 1, stride) if start + length - 1 <= i)


@pytest.mark.parametrize("length", [1, 31, 32, 200, 333])
def test_other_selectors_cost_what_a_counting_loop_counts(length):
    a = AttentionConfig(init_tokens=16, local_tokens=32)
    a.selector = Selector.window
    assert flops.selected_pairs(length, a, 2) == sum(len(allowed_keys(i, a, 0)) for i in range(length))
    assert flops.selection_flops(length, model(), a) == flops.scored_pairs(length, a) == 0
    a.selector = Selector.dense_window
    seen = [{j for j in range(i + 1) if j < 16 or j > i - 32} for i in range(length)]
    assert flops.selected_pairs(length, a, 2) == sum(map(len, seen))
    assert flops.attended_tokens(length - 1, a, 2) == len(seen[-1])
    a.selector = Selector.moba
    candidates = sum(max(0, i // 16 - 2) for i in range(length))
    assert flops.scored_pairs(length, a) == candidates
    a.selector = Selector.infllm_v2
    assert flops.scored_pairs(length, a) == sum(ended_windows(i, 32, 16) for i in range(length))
    a.coarse_lse = True
    both = sum(ended_windows(i, 32, 16) + ended_windows(i, 128, 64) for i in range(length))
    assert flops.scored_pairs(length, a) == both


@pytest.mark.parametrize("length", [1, 40, 333])
def test_nsa_costs_what_a_counting_loop_counts(length):
    a = AttentionConfig(
        selector=Selector.nsa, init_tokens=16, local_tokens=32, nsa_window_tokens=50, train_topk=2
    )
    blocks = [allowed_keys(i, a, 2) for i in range(length)]
    window = [set(range(max(0, i - 49), i + 1)) for i in range(length)]
    compressed = sum(ended_windows(i, 32, 16) for i in range(length))
    assert flops.scored_pairs(length, a) == compressed
    # At most: with blocks chosen outside of the window wherever there are so many.
    fixed = [allowed_keys(i, a, 0) | w for i, w in enumerate(window)]
    most = [min(i + 1, len(fixed[i]) + len(blocks[i]) - len(allowed_keys(i, a, 0))) for i in range(length)]
    assert [flops.attended_tokens(i, a, 2) for i in range(length)] == most
    assert flops.selected_pairs(length, a, 2) == sum(most)
    m = model()
    p = flops.count_parameters(m, 151936, a)
    windows = len(range(0, length - 31, 16))
    compressing = 2 * windows * 2 * m.num_kv_heads * (32 * 128 * 128 + 128 * 128)
    pairs = sum(map(len, blocks)) + sum(map(len, window)) + compressed
    layer = 4 * m.head_dim * m.num_query_heads * pairs + compressing
    linear = 2 * p.active_in_products * length
    assert flops.train_flops_per_sequence(length, m, p, a) == 3 * (linear + m.num_layers * layer)


def test_the_indexer_scores_candidates_with_its_own_heads_and_the_alignment_loss_adds_full_attention():
    m, a = model(), AttentionConfig()
    p = flops.count_parameters(m, 151936)
    sparse = flops.train_flops_per_sequence(4096, m, p, a)
    a.align_coeff = 10.0
    full = 3 * m.num_layers * flops.attention_flops(flops.causal_pairs(4096), m)
    assert flops.train_flops_per_sequence(4096, m, p, a) - sparse == full
    a = AttentionConfig(selector=Selector.indexer, indexer_heads=3)
    candidates = sum(max(0, i // 16 - 8) for i in range(4096))
    assert flops.scored_pairs(4096, a) == candidates
    assert flops.selection_flops(4096, m, a) == 2 * 8 * 3 * 129 * candidates + 2 * 4096 * 8 * 128


def test_two_vectors_a_block_are_scored_twice_and_dense_layers_are_counted_as_such():
    m, a = model(), AttentionConfig()
    one = flops.selection_flops(4096, m, a)
    a.selector = Selector.halves
    assert flops.selection_flops(4096, m, a) - one == 2 * 128 * 16 * flops.scored_pairs(4096, a)
    a.selector, p = Selector.phsa, flops.count_parameters(m, 151936)
    sparse, dense = (flops.train_flops_per_sequence(4096, m, p, x) for x in (a, None))
    a.dense_layers = list(range(1, 15))  # half of the layers
    assert 2 * flops.train_flops_per_sequence(4096, m, p, a) == sparse + dense
