import dataclasses

import pytest

from phsa_megatron.config.context_volume import (
    ContextVolume,
    ExchangedTokens,
    context_volume,
    volume_across_nodes,
)
from phsa_megatron.config.flops import count_parameters
from phsa_megatron.config.memory import estimate_memory
from phsa_megatron.config.schema import AttentionKind, ContextExchange, Dtype, TrainConfig


def _config(context_size: int) -> TrainConfig:
    config = TrainConfig()
    config.run.dtype = Dtype.bf16
    config.model.num_layers, config.model.hidden_size, config.model.ffn_hidden_size = 4, 1024, 3072
    config.model.num_query_heads, config.model.num_kv_heads, config.model.head_dim = 16, 8, 128
    config.model.vocab_size = 1000
    config.attention.block_tokens = 16
    config.data.seq_len_tokens, config.optim.micro_batch_sequences = 32768, 1
    config.parallel.tensor_size, config.parallel.context_size = 2, context_size
    return config


def test_volume_of_a_layer_at_32k_by_hand():
    # 4 heads x 128 channels x 2 bytes = 1024 bytes a key; 8192 own tokens, sent to 3 others.
    assert context_volume(_config(4)) == ContextVolume(
        boundary_keys_bytes=3 * 30 * 1024,
        pooled_keys_bytes=3 * 512 * 1024,
        block_marks_bytes=0,
        keys_and_values_bytes=3 * 2 * 8192 * 1024,
        gradient_bytes=3 * 2 * 8192 * 1024,
    )
    assert context_volume(_config(4)).forward_bytes == 3 * 1024 * (30 + 512 + 16384)


def test_exchanged_blocks_take_the_place_of_all_keys_and_one_byte_marks_each_block():
    config = _config(4)
    config.parallel.context_exchange = ContextExchange.block_sparse
    config.data.max_documents_per_sequence = 8
    everything, found = context_volume(_config(4)), context_volume(config, ExchangedTokens(1600, 48))
    assert found == dataclasses.replace(
        everything,
        block_marks_bytes=3 * (2048 + 8),
        keys_and_values_bytes=2 * 1600 * 1024,
        gradient_bytes=2 * 48 * 1024,
    )
    most = context_volume(config)
    assert most == dataclasses.replace(everything, block_marks_bytes=3 * (2048 + 8))


def test_every_key_crosses_to_every_other_node_once():
    config = _config(8)
    config.parallel.context_node_size = 4
    everything = context_volume(config)
    assert volume_across_nodes(config).keys_and_values_bytes == 2 * 4096 * 1024
    assert 7 * volume_across_nodes(config).forward_bytes == everything.forward_bytes
    config.parallel.context_node_size = None
    with pytest.raises(ValueError, match="context_node_size is null"):
        volume_across_nodes(config)


def test_dense_attention_sends_no_pooled_keys_and_one_process_sends_nothing():
    config = _config(2)
    config.attention.kind = AttentionKind.dense
    assert context_volume(config) == ContextVolume(0, 0, 0, 2 * 16384 * 1024, 2 * 16384 * 1024)
    assert set(dataclasses.astuple(context_volume(_config(1)))) == {0}


def test_memory_of_a_device_falls_with_context_parallelism_but_not_below_the_gathered_keys():
    config = _config(1)
    parameters = count_parameters(config.model, 1000)
    one, eight = (estimate_memory(_config(size), parameters, 1000, 1, 1) for size in (1, 8))
    assert eight.logits_gib == one.logits_gib / 8
    keys_and_values_gib = 4 * 2 * 32768 * 1024 / (1 << 30)
    assert (one.gathered_kv_gib, eight.gathered_kv_gib) == (0, keys_and_values_gib)
    # The values' own view of the projection goes, where there is no norm of keys to keep it.
    assert eight.activations_gib < one.activations_gib / 8 * 1.01
