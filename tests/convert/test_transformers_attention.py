"""PHSA in transformers' own models: with the cache as without it, padded as unpadded, and what is refused."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers", reason="the library that is extended")

from transformers import AutoModelForCausalLM, DynamicCache

from phsa_megatron.attention.punctuation import PunctuationTable, table_of
from phsa_megatron.config.errors import ConfigError, DeviceError
from phsa_megatron.config.schema import AttentionConfig, AttentionKind, Selector
from phsa_megatron.convert.phsa_entry import phsa_entry
from phsa_megatron.convert.transformers_attention import use_phsa
from phsa_megatron.data.tokenizer import Tokenizer
from tests.convert.conftest import EOD

SETTINGS = AttentionConfig(block_tokens=4, init_tokens=4, local_tokens=8, train_topk=2)
# fp32; sums of at most 100 products in another order in two layers, logits of about 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def table(tokenizer_file) -> PunctuationTable:
    return table_of(Tokenizer.from_file(tokenizer_file, EOD).decoded_tokens(), SETTINGS)


@pytest.fixture(params=["qwen3", "llama"])
def kind(request):
    return request.param


@pytest.fixture
def load(model_folder, table):
    def build(kind="qwen3", settings=SETTINGS, **options):
        model = AutoModelForCausalLM.from_pretrained(model_folder(kind), dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None  # of random tokens one is the end before long
        return use_phsa(model, settings, table, **({"implementation": "phsa_eager"} | options))

    return build


@pytest.fixture(scope="module")
def tokens():
    """Random ids [2, 72], a quarter of them punctuation."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(11, 85, (2, 72), generator=generator)
    marks = torch.randint(1, 11, (2, 72), generator=generator)
    return torch.where(torch.rand(2, 72, generator=generator) < 0.25, marks, words)


@torch.no_grad()
def logits_of(model, tokens, **options):
    return model(tokens, use_cache=False, **options).logits


@torch.no_grad()
def in_pieces(model, tokens, sizes, cache=None):
    """Logits [b, S, vocab] of pieces read one after the other, over the cache."""
    found, start = [], 0
    for size in sizes:
        out = model(tokens[:, start : start + size], past_key_values=cache, use_cache=True)
        found.append(out.logits)
        cache, start = out.past_key_values, start + size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"selector": Selector.random_tokens},
        {"selector": Selector.minmax, "mean_weight_frac": 1.0},
        {"dense_layers": [2]},
    ],
    ids=["phsa", "random_tokens", "minmax", "dense layer"],
)
def test_logits_over_the_cache_are_those_of_the_whole_text(load, tokens, changes):
    model = load(settings=dataclasses.replace(SETTINGS, **changes))
    whole = logits_of(model, tokens)
    # Over the boundaries of blocks and windows, many tokens at once and one by one.
    torch.testing.assert_close(in_pieces(model, tokens, [30, 7, *[1] * 35]), whole, **TOLERANCE)
    model.set_attn_implementation("eager")
    assert (logits_of(model, tokens) - whole)[:, 40:].abs().max() > 0.1


def test_a_cache_without_the_ids_of_its_tokens_gives_other_logits(load, tokens):
    """Negative control: what the layer of token ids is for."""
    model = load()
    whole = logits_of(model, tokens)
    cache = DynamicCache()
    in_pieces(model, tokens[:, :70], [70], cache)
    cache.layers[-1].keys.fill_(50)  # all words, no punctuation
    last = in_pieces(model, tokens[:, 70:], [2], cache)
    assert (last - whole[:, 70:]).abs().max() > 1e-2


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_cache_is_generation_without_it_with_padded_prompts(load, tokens, kind, beams):
    model = load(kind)
    prompts, mask = tokens[:, :40].clone(), torch.ones(2, 40, dtype=torch.int64)
    prompts[1, :13], mask[1, :13] = 0, 0
    options = {"max_new_tokens": 24, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cached = model.generate(prompts, attention_mask=mask, **options)
    computed = model.generate(prompts, attention_mask=mask, use_cache=False, **options)
    assert cached.shape == (2, 64) and torch.equal(cached, computed)
    alone = model.generate(prompts[1:, 13:], **options)  # the padded row, without its padding
    assert torch.equal(alone[0], cached[1, 13:])
    dense = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32).eval()
    dense.generation_config.eos_token_id = None
    assert not torch.equal(dense.generate(prompts, attention_mask=mask, **options), cached)


def test_padding_on_either_side_changes_nothing(load, tokens):
    model = load()
    expected = logits_of(model, tokens[:1])
    for left, right in ((5, 0), (0, 6), (3, 2)):
        padded = torch.nn.functional.pad(tokens[:1], (left, right))
        mask = torch.nn.functional.pad(torch.ones(1, 72, dtype=torch.int64), (left, right))
        found = logits_of(model, padded, attention_mask=mask)[:, left : left + 72]
        torch.testing.assert_close(found, expected, **TOLERANCE)
    unmasked = logits_of(model, torch.nn.functional.pad(tokens[:1], (5, 0)))[:, 5:]
    assert (unmasked - expected).abs().max() > 0.1


def test_a_cropped_cache_forgets_the_ids_too(load, tokens):
    model = load()
    expected = logits_of(model, tokens[:1])
    cache = DynamicCache(config=model.config)
    in_pieces(model, tokens[1:], [50], cache)
    for layer in cache.layers:  # to the same length whatever a version calls the argument of crop
        layer.keys, layer.values = layer.keys[..., :0, :], layer.values[..., :0, :]
    torch.testing.assert_close(in_pieces(model, tokens[:1], [60, 12], cache), expected, **TOLERANCE)


def test_settings_and_punctuation_come_from_the_folder(load, tokens, table, tmp_path):
    model = load()
    expected = logits_of(model, tokens)
    model.config.phsa = phsa_entry(SETTINGS, table)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="phsa_eager"
    )
    with pytest.raises(ConfigError, match="use_phsa"):
        logits_of(again, tokens)
    torch.testing.assert_close(logits_of(use_phsa(again), tokens), expected)
    use_phsa(again, dataclasses.replace(SETTINGS, infer_topk=1))  # the last call counts
    assert (logits_of(again, tokens) - expected).abs().max() > 0.01
    again.config.phsa = phsa_entry(dataclasses.replace(SETTINGS, kind=AttentionKind.dense), table)
    with pytest.raises(ConfigError, match="trained with dense attention"):
        use_phsa(again)


def test_gradients_flow_through_the_selected_blocks(load, tokens):
    model = load().train()
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_the_kernels_are_not_replaced_on_a_cpu(load, tokens):
    with pytest.raises(DeviceError, match="phsa_eager"):
        logits_of(load(implementation="phsa"), tokens)


def test_what_cannot_be_served_is_refused(load, tokens, model_folder, table):
    model = load()
    packed = torch.cat([torch.arange(40), torch.arange(32)])[None]
    holes = torch.ones(2, 72, dtype=torch.int64)
    holes[0, 20] = 0
    with pytest.raises(ValueError, match="count up by one"):
        logits_of(model, tokens[:1], position_ids=packed)
    with pytest.raises(ValueError, match="holes"):
        logits_of(model, tokens, attention_mask=holes)
    with pytest.raises(ValueError, match="attention_mask is"):
        logits_of(model, tokens, attention_mask=torch.ones(2, 1, 72, 72))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=model.model.embed_tokens(tokens))
    with pytest.raises(ConfigError, match="StaticCache"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static", do_sample=False)
    foreign = DynamicCache(config=model.config)
    for layer in foreign.layers:
        layer.update(torch.zeros(2, 2, 5, 16), torch.zeros(2, 2, 5, 16))
    with pytest.raises(ConfigError, match="whose ids are not known"):
        model(tokens, past_key_values=foreign)
    short = load(settings=dataclasses.replace(SETTINGS, dense_len_tokens=40))
    with pytest.raises(ConfigError, match="dense_len_tokens=40"):
        in_pieces(short, tokens, [39, 1, 1])
    plain = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"))
    with pytest.raises(ConfigError, match="has no entry 'phsa'"):
        use_phsa(plain, implementation="phsa_eager")
    with pytest.raises(ConfigError, match="implementation='sdpa'"):
        use_phsa(plain, SETTINGS, table)
    with pytest.raises(ConfigError, match="dense_window"):
        logits_of(load(settings=dataclasses.replace(SETTINGS, selector=Selector.dense_window)), tokens)


@pytest.mark.gpu
def test_the_kernels_give_the_logits_of_the_reference(model_folder, table, tokens):
    settings = dataclasses.replace(SETTINGS, block_tokens=16, init_tokens=16, local_tokens=32, train_topk=1)
    model = AutoModelForCausalLM.from_pretrained(model_folder("qwen3"), dtype=torch.float32).eval().cuda()
    long = tokens.repeat(1, 4).cuda()
    mask = torch.ones_like(long)
    mask[1, :21] = 0
    found = {}
    for name in ("phsa", "phsa_eager"):
        use_phsa(model, settings, table, implementation=name)
        found[name] = logits_of(model, long, attention_mask=mask)
        pieces = in_pieces(model, long, [250, 30, *[1] * 8])
        torch.testing.assert_close(pieces, logits_of(model, long), rtol=5e-3, atol=5e-3)
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        found[name + " text"] = model.generate(long, attention_mask=mask, **options)
    # fp32 products of the kernels run on tensor cores in tf32: 10 bits, logits of about 10.
    torch.testing.assert_close(found["phsa"][0], found["phsa_eager"][0], rtol=5e-3, atol=5e-2)
    torch.testing.assert_close(found["phsa"][1, 21:], found["phsa_eager"][1, 21:], rtol=5e-3, atol=5e-2)
    assert found["phsa text"].shape == (2, 304)
