"""A Llama of two small layers and a tokenizer of bytes, as the study reads a real model."""

import pytest
import torch


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("byte_llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        tie_word_embeddings=True,
        initializer_range=0.6,  # attention that is far from even
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
