"""The probe model against transformers, and its sparse attention against the kernels' attend."""

import pytest
import torch

from phsa_kernels.api import attend
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch, Selector
from phsa_megatron.config.selector_kinds import WITHOUT_SECOND_BRANCH
from phsa_megatron.evaluation.probe_attention import SELECTORS, Probe, selects, settings_of
from phsa_megatron.evaluation.probe_model import ProbeModel, attend_densely

TABLE = PunctuationTable.build(
    ["." if t % 5 == 0 else "a" for t in range(64)], PunctuationMatch.exact, PunctuationLanguage.en
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def test_logits_are_those_of_transformers_also_in_two_parts(llama):
    folder, theirs = llama
    ours = ProbeModel(folder)
    tokens = torch.randint(0, 64, (50,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
    hidden, _ = ours.read(tokens)
    torch.testing.assert_close(ours.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    _, before = ours.read(tokens[:30])
    hidden, after = ours.read(tokens[30:], before)
    torch.testing.assert_close(ours.logits(hidden), expected[30:], rtol=1e-4, atol=1e-4)
    assert before.num_tokens == 30 and after.num_tokens == 50
    assert not torch.allclose(ours.logits(hidden), expected[29:49], atol=1e-2)


def test_reading_with_many_attentions_is_reading_with_each(llama):
    ours = ProbeModel(llama[0])
    tokens = torch.randint(0, 64, (120,), generator=torch.Generator().manual_seed(1))
    settings = AttentionConfig(block_tokens=8, init_tokens=8, local_tokens=16)
    probe = Probe.of(tokens, settings, TABLE)
    attends = [attend_densely, lambda _, q, k, v: probe.attend(1, q, k, v)]
    _, before = ours.read(tokens[:100])
    together, _ = ours.read_many(tokens[100:], before, attends)
    for one, attend_one in zip(together, attends, strict=True):
        alone, _ = ours.read(tokens[100:], before, attend_one)
        torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("selector", sorted(set(Selector) - {Selector.dense_window}))
def test_sparse_attention_of_the_last_queries_is_the_kernels(selector):
    lam = 1.0 if selector in WITHOUT_SECOND_BRANCH else 0.5
    settings = AttentionConfig(
        selector=selector, block_tokens=16, init_tokens=16, local_tokens=32, mean_weight_frac=lam
    )
    g = torch.Generator().manual_seed(0)
    total, n = 150, 40
    q = torch.randn(n, 4, 8, generator=g)
    k, v = (torch.randn(total, 2, 8, generator=g) for _ in "kv")
    probe = Probe.of(torch.randint(0, 64, (total,), generator=g), settings, TABLE)
    rows = torch.arange(total - n, total)
    expected, _ = attend(
        q,
        k,
        v,
        probe.choose(q, k, rows, 2),
        rows.to(torch.int32),
        torch.zeros(n, dtype=torch.int32),
        torch.tensor([0, total], dtype=torch.int32),
        init_tokens=16,
        local_tokens=32,
    )
    torch.testing.assert_close(probe.attend(2, q, k, v), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="149 keys for a document of 150"):
        probe.attend(2, q, k[:149], v[:149])


def test_the_studys_selectors_share_windows_and_punctuation():
    for name in ("phsa", "separators", "minmax", "window"):  # each takes a moment to compose
        assert name in SELECTORS
        settings = settings_of(name, 128, 512, language="en_zh")
        assert (settings.init_tokens, settings.local_tokens, settings.block_tokens) == (128, 512, 16)
        assert settings.punctuation_language == ("en" if name == "separators" else "en_zh")
        assert selects(name, settings) == (name != "window")
