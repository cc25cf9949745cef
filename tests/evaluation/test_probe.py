"""The probe model against transformers, and its sparse attention against the kernels' attend."""

import pytest
import torch

from phsa_kernels.api import attend
from phsa_megatron.attention.block_choice import choose_blocks
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch, Selector
from phsa_megatron.config.selector_kinds import WITH_PARAMETERS, WITHOUT_SECOND_BRANCH
from phsa_megatron.evaluation import probe_attention
from phsa_megatron.evaluation.probe_attention import SELECTORS, Probe, selects, settings_of
from phsa_megatron.evaluation.probe_model import ProbeModel

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
    tokens = torch.randint(0, 64, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    hidden, _ = ours.read(tokens)
    torch.testing.assert_close(ours.logits(hidden), expected, rtol=1e-4, atol=1e-4)
    _, before = ours.read(tokens[:, :30])
    hidden, after = ours.read(tokens[:, 30:], before)
    torch.testing.assert_close(ours.logits(hidden), expected[:, 30:], rtol=1e-4, atol=1e-4)
    assert before.num_tokens == 30 and after.num_tokens == 50
    assert ours.read(tokens, keeps=False)[1].num_tokens == 0
    assert not torch.allclose(ours.logits(hidden), expected[:, 29:49], atol=1e-2)


@pytest.mark.parametrize("selector", sorted(set(Selector) - WITH_PARAMETERS - {Selector.dense_window}))
def test_sparse_attention_of_the_last_queries_is_the_kernels_document_by_document(selector, monkeypatch):
    """Documents that stand side by side as heads, in parts of a mask, against the kernels with each alone."""
    monkeypatch.setattr(probe_attention, "_MASK_ENTRIES", 7_000)
    lam = 1.0 if selector in WITHOUT_SECOND_BRANCH else 0.5
    settings = AttentionConfig(
        selector=selector, block_tokens=16, init_tokens=16, local_tokens=32, mean_weight_frac=lam
    )
    g = torch.Generator().manual_seed(0)
    b, total, n = 3, 150, 40
    q = torch.randn(b, n, 4, 8, generator=g)
    k, v = (torch.randn(b, total, 2, 8, generator=g) for _ in "kv")
    tokens = torch.randint(0, 64, (b, total), generator=g)
    rows = torch.arange(total - n, total)
    probe = Probe.of(tokens, settings, TABLE)
    together = probe.attend(2, q, k, v)
    by_kernel = probe.attend_chosen(probe.choose(q, k, rows, 2), q, k, v, "reference")
    torch.testing.assert_close(by_kernel, together, rtol=1e-5, atol=1e-5)
    for i in range(b):
        cu_seqlens = torch.tensor([0, total], dtype=torch.int32)
        side_info = SideInfo.build(tokens[i : i + 1], cu_seqlens, TABLE, settings, 2)
        where = rows.to(torch.int32), torch.zeros(n, dtype=torch.int32)
        ids = choose_blocks(q[i], k[i], *where, side_info, settings, 2, None)
        expected, _ = attend(q[i], k[i], v[i], ids, *where, cu_seqlens, init_tokens=16, local_tokens=32)
        torch.testing.assert_close(together[i], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="149 keys for documents of 150"):
        Probe.of(tokens, settings, TABLE).attend(2, q, k[:, :149], v[:, :149])


def test_the_studys_selectors_share_windows_and_punctuation():
    for name in ("phsa", "separators", "minmax", "window"):  # each takes a moment to compose
        assert name in SELECTORS
        settings = settings_of(name, 128, 512, language="en_zh")
        assert (settings.init_tokens, settings.local_tokens, settings.block_tokens) == (128, 512, 16)
        assert settings.punctuation_language == ("en" if name == "separators" else "en_zh")
        assert selects(name, settings) == (name != "window")
