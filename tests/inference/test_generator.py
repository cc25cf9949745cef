"""Generation with a cache against the whole text read from scratch, in fp64 unless said otherwise."""

import pytest
import torch

from phsa_megatron.attention.kv_cache import CACHED_SELECTORS, DecodeStep, check_selector
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import (
    AttentionConfig,
    AttentionKind,
    GroupScore,
    PunctuationLanguage,
    PunctuationMatch,
    Selector,
)
from phsa_megatron.inference.generate import generate
from phsa_megatron.inference.generator import Completion, Generator
from phsa_megatron.inference.sampling import Sampling
from phsa_megatron.model.factory import build_model

TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)
# Blocks of 4, init 4, local 8: below a block, at and after boundaries of blocks and windows, far past them.
PROMPTS = [[(37 * i + 11 * n) % 100 for i in range(n)] for n in (1, 4, 5, 12, 31, 40)]
NEW_TOKENS = 10


class Recording(Generator):
    """Keeps the logits of every choice, and can change what the cache is told."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.logits = []

    def _choose(self, logits, sampling, draws):
        self.logits.append(logits.clone())
        return super()._choose(logits, sampling, draws)


@pytest.fixture
def ready(tiny_config, single_process_groups):
    """Returns (config, model, generator) of a recipe with weights large enough to make up its mind."""

    def build(dtype=torch.float64, generator=None, **overrides):
        config = tiny_config(**overrides)
        torch.manual_seed(5)
        model = build_model(config, single_process_groups)[0]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0)
        model.to(dtype)
        return config, model, Recording(model, config, TABLE, vocab_size=100, **(generator or {}))

    return build


def logits_from_scratch(config, model, tokens, topk):
    """Logits [n, 100] of one whole document, in one pass without a cache."""
    ids = torch.tensor([tokens])
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    model.eval()
    logits = []
    hook = model.output_layer.register_forward_hook(lambda _m, _a, out: logits.append(out[0][:, 0, :100]))
    with torch.no_grad():
        positions = torch.arange(len(tokens)).unsqueeze(0)
        info = SideInfo.build(ids, bounds, TABLE, config.attention, topk)
        labels = ids if config.model.mtp_num_layers else None
        model(ids, positions, None, labels=labels, packed_seq_params=info)
    hook.remove()
    return logits[-1]


def worst_difference(config, model, generator, prompts=PROMPTS, sampling=None, topk=2):
    """Largest difference of any choice's logits from those of the whole text, over the largest logit."""
    done = generator.generate(prompts, sampling or Sampling(max_tokens=NEW_TOKENS))
    worst = 0.0
    for row, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        whole = logits_from_scratch(config, model, [*prompt, *completion.tokens], topk)
        wanted = whole[len(prompt) - 1 : -1]
        mine = torch.stack([step[row] for step in generator.logits[: len(wanted)]])
        assert len(mine) == len(completion.tokens)
        worst = max(worst, float((mine - wanted).abs().max() / wanted.abs().max()))
    return worst, done


# Pooling weights are fp32 on the way through the prompt, and running sums fp64 after it: 2**-24 of a key.
TOLERANCE = 1e-6
RECIPES = {
    "phsa": {},
    "raw sum": {"attention__group_score": GroupScore.raw_sum},
    "no init": {"attention__init_tokens": 0},
    "longer local window": {"attention__local_tokens": 16},
    "dense layer": {"attention__dense_layers": [2]},
    "prediction layer": {"model__mtp_num_layers": 1},
    "dense": {"attention__kind": AttentionKind.dense},
    "no qk norm, untied": {"model__qk_norm": False, "model__tie_embeddings": False},
    **{
        name.value: {"attention__selector": name, "attention__mean_weight_frac": 0.25}
        for name in CACHED_SELECTORS
        if name not in (Selector.mean_pool, Selector.window)
    },
    **{
        name.value: {"attention__selector": name, "attention__mean_weight_frac": 1.0}
        for name in (Selector.mean_pool, Selector.window)
    },
}


@pytest.mark.parametrize("overrides", RECIPES.values(), ids=RECIPES.keys())
def test_every_choice_has_the_logits_of_the_whole_text(ready, overrides):
    worst, done = worst_difference(*ready(**overrides))
    assert worst < TOLERANCE
    assert all(completion.finish_reason == "length" for completion in done)
    assert len({token for completion in done for token in completion.tokens}) > 5


@pytest.mark.parametrize("mistake", ["marks", "pooled", "positions"])
def test_the_comparison_notices_a_cache_that_is_wrong(ready, mistake, monkeypatch):
    config, model, generator = ready()
    if mistake == "marks":
        monkeypatch.setattr(
            "phsa_megatron.attention.kv_cache.KeyValueCache.marks",
            lambda cache, tokens, lengths: ~TABLE.is_punctuation[tokens],
        )
    elif mistake == "pooled":
        right = generator._read_prompts

        def wrong(prompts, cache):
            logits = right(prompts, cache)
            for layer in cache._layers.values():
                layer.pooled.copy_(layer.pooled.roll(1, 1))
            return logits

        monkeypatch.setattr(generator, "_read_prompts", wrong)
    else:
        right = generator._hidden

        def wrong(tokens, positions, angles, info):
            return right(tokens, positions, angles * 1.01 if isinstance(info, DecodeStep) else angles, info)

        monkeypatch.setattr(generator, "_hidden", wrong)
    assert worst_difference(config, model, generator)[0] > 100 * TOLERANCE


def test_tokens_are_those_of_the_sampler_without_a_cache(ready, single_process_groups):
    """Step by step: every token of a whole forward pass of its own, in the recipe's fp32."""
    config, model, generator = ready(torch.float32)
    done = generator.generate(PROMPTS, Sampling(max_tokens=8))
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.tokens == generate(
            [model], prompt, 8, config=config, groups=single_process_groups, table=TABLE, vocab_size=100
        )


@pytest.mark.parametrize("prefill_tokens", [1, 130])
def test_neither_the_batch_nor_the_passes_over_prompts_matter(ready, prefill_tokens):
    _, _, together = ready()
    _, _, apart = ready(generator={"prefill_tokens": prefill_tokens})
    for sampling in (Sampling(max_tokens=6), Sampling(max_tokens=6, temperature=1.5, top_p=0.9, seed=3)):
        wanted = together.generate(PROMPTS, sampling)
        assert wanted == apart.generate(PROMPTS, sampling)
        alone = [apart.generate([p], sampling, first_number=i)[0] for i, p in enumerate(PROMPTS)]
        assert wanted == alone


def test_topk_of_inference_is_used(ready):
    config, model, generator = ready(generator={"topk": 9})
    long = [[(13 * i * i) % 100 for i in range(60)]]
    assert worst_difference(config, model, generator, long, topk=9)[0] < TOLERANCE
    generator.logits.clear()
    assert worst_difference(config, model, generator, long, topk=1)[0] > 100 * TOLERANCE
    assert ready(attention__infer_topk=5)[2].topk == 5
    assert ready()[2].topk == 2


def test_dense_until_a_length_then_sparse(ready):
    """Tokens up to dense_len_tokens see everything, later ones select; keys stay as they were computed."""
    config, model, generator = ready(attention__dense_len_tokens=44)
    worst, _ = worst_difference(config, model, generator, [PROMPTS[4]], Sampling(max_tokens=13))
    assert worst < TOLERANCE, "31 + 13 tokens are all dense"
    generator.logits.clear()
    long = [[(13 * i * i) % 100 for i in range(60)]]
    assert worst_difference(config, model, generator, long)[0] < TOLERANCE, "60 tokens are all sparse"


def test_sampling_is_repeatable_and_seeded(ready):
    _, _, generator = ready()
    run = [generator.generate(PROMPTS, Sampling(1.0, seed=seed, max_tokens=12)) for seed in (1, 1, 2)]
    assert run[0] == run[1] != run[2]


def test_it_stops_after_the_end_of_document_and_others_go_on(ready):
    _, model, generator = ready()
    full = [c.tokens for c in generator.generate(PROMPTS, Sampling(max_tokens=10))]
    eod = full[4][3]
    config = ready()[0]
    told = []
    stopping = Generator(model, config, TABLE, vocab_size=100, eod_id=eod)
    done = stopping.generate(
        PROMPTS, Sampling(max_tokens=10), on_token=lambda i, token: told.append((i, token))
    )
    for i, (tokens, completion) in enumerate(zip(full, done, strict=True)):
        ends = eod in tokens
        wanted = tokens[: tokens.index(eod) + 1] if ends else tokens
        assert completion == Completion(wanted, "stop" if ends else "length")
        assert [token for row, token in told if row == i] == wanted
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_cache_memory_is_as_stated(ready):
    """As docs/inference.md says: per layer, sequence and key-value head."""
    _, _, generator = ready(torch.float32)
    generator.generate(PROMPTS, Sampling(max_tokens=2))
    capacity, batch, layers, heads, dim, m = 44, len(PROMPTS), 2, 2, 8, 4  # 40 + 2 tokens in whole blocks
    cells = 2 * capacity * dim + capacity // m * dim
    assert generator.cache_bytes == layers * batch * heads * 4 * (cells + 2 * dim + 1)


def test_the_model_is_left_as_it_was(ready):
    _, model, generator = ready()
    model.train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    generator.generate(PROMPTS[:2], Sampling(1.0, max_tokens=3))
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("overrides", "generator", "message"),
    [
        ({"attention__selector": Selector.minmax}, {}, "attention.selector=minmax: generation with a cache"),
        ({"attention__selector": Selector.random_tokens}, {}, "use one of these"),
        ({}, {"topk": 0}, "topk=0 must be at least 1"),
        ({}, {"cuda_graph": True}, "cuda_graph needs a CUDA device"),
    ],
)
def test_what_is_not_served_is_refused(ready, overrides, generator, message):
    with pytest.raises(ConfigError, match=message):
        ready(generator=generator, **overrides)


@pytest.mark.parametrize("selector", [s for s in Selector if s not in CACHED_SELECTORS], ids=str)
def test_selectors_without_a_cache_are_refused_by_name(selector):
    """Those with weights of their own, nsa and indexer, are among them."""
    attention = AttentionConfig(selector=selector)
    with pytest.raises(ConfigError, match=rf"attention\.selector={selector.value}: .*enough for phsa, "):
        check_selector(attention)
    attention.kind = AttentionKind.dense
    check_selector(attention)
    assert {Selector.nsa, Selector.indexer}.isdisjoint(CACHED_SELECTORS)


def test_a_layout_of_several_processes_is_refused(ready):
    config, model, _ = ready()
    config.parallel.tensor_size = 2
    with pytest.raises(ConfigError, match=r"parallel\.tensor_size=2.*load the checkpoint with"):
        Generator(model, config, TABLE, vocab_size=100)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "at least one token"), ([[1], []], "at least one"), ([[100]], "not in 0 to 99")],
)
def test_bad_prompts_are_refused(ready, prompts, message):
    with pytest.raises(ValueError, match=message):
        ready()[2].generate(prompts, Sampling())
