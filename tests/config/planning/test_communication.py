import pytest

from phsa_megatron.config import flops
from phsa_megatron.config.context_volume import context_volume
from phsa_megatron.config.derive import derive
from phsa_megatron.config.memory import stage_parameters
from phsa_megatron.config.planning.communication import communication
from phsa_megatron.config.schema import AttentionKind, Loss, Recompute

HIDDEN, LAYERS, TOKENS = 4096, 36, 32768
RESIDUAL = TOKENS * HIDDEN * 2
LOSS = 3 * 2 * 4 * TOKENS


def sent(config):
    padded = flops.padded_vocab_size(config.model, config.parallel.tensor_size)
    return communication(config, flops.count_parameters(config.model, padded), padded)


def test_one_gpu_sends_nothing(large):
    alone = large(parallel__tensor_size=1, parallel__sequence_parallel=False, cluster__processes_per_node=1)
    assert sent(alone).step_bytes == 0


def test_sequence_parallel_activations_by_hand(large):
    """TP 4, 32 sequences over two copies: 16 micro-batches. Without recomputation a layer has 4 gathers and
    scatters forward and 6 backward, each of 3/4 of the residual stream; output layer and embedding add 5,
    and the loss three sums of an fp32 number a token."""
    config = large(parallel__recompute=Recompute.none, compute__loss=Loss.whole)
    traffic = sent(config).tensor
    unit = RESIDUAL * 3 // 4
    assert traffic.step_bytes == 16 * ((LAYERS * 10 + 5) * unit + LOSS * 3 // 4)
    assert traffic.messages == 16 * (LAYERS * 10 + 5 + 3)
    again = sent(large(parallel__recompute=Recompute.full, compute__loss=Loss.whole)).tensor
    assert again.step_bytes - traffic.step_bytes == 16 * LAYERS * 4 * unit
    assert sent(large(parallel__recompute=Recompute.selective, compute__loss=Loss.whole)).tensor == traffic


def test_all_reduces_without_sequence_parallelism_by_hand(large):
    """Two all-reduces forward and two backward, each as much as a gather and a scatter."""
    config = large(
        parallel__sequence_parallel=False, parallel__recompute=Recompute.none, compute__loss=Loss.whole
    )
    traffic = sent(config).tensor
    assert traffic.step_bytes == 16 * ((LAYERS * 8 + 4) * RESIDUAL + LOSS) * 3 // 4
    assert traffic.messages == 16 * ((LAYERS * 8 + 4) / 2 + 3)


def test_gradients_and_weights_by_hand(large):
    config = large(parallel__tensor_size=1, parallel__sequence_parallel=False)
    derived = derive(config)
    total = derived.parameters.total
    assert total == 8_190_735_360
    assert sent(config).gradients.step_bytes == 4 * total * 7 / 8
    assert sent(config).weights.step_bytes == 2 * total * 7 / 8
    kept = large(
        parallel__tensor_size=1, parallel__sequence_parallel=False, parallel__distributed_optimizer=False
    )
    assert sent(kept).gradients.step_bytes == 2 * 4 * total * 7 / 8
    assert sent(kept).weights.step_bytes == 0


def test_context_parallel_bytes_are_those_that_the_layouts_tests_count(large):
    """`tests/distributed` counts what `context_volume` says of a layer and a micro-batch."""
    for recompute, runs in ((Recompute.none, 1), (Recompute.selective, 2), (Recompute.full, 2)):
        config = large(parallel__tensor_size=2, parallel__context_size=4, parallel__recompute=recompute)
        volume, traffic = context_volume(config), sent(config)
        layers = LAYERS * 32  # one copy: 32 micro-batches
        forward = traffic.context_keys.step_bytes + traffic.context_kv.step_bytes
        assert forward == runs * layers * volume.forward_bytes > 0
        assert traffic.context_gradients.step_bytes == layers * volume.gradient_bytes > 0
        assert (traffic.context_kv.size, traffic.context_kv.stride) == (4, 2)
    dense = sent(
        large(parallel__tensor_size=2, parallel__context_size=4, attention__kind=AttentionKind.dense)
    )
    assert (dense.context_keys.step_bytes, dense.context_keys.messages) == (0, 0)


def test_sends_between_stages_by_hand(large):
    """A middle stage sends each micro-batch on and its gradient back, sharded by sequence parallelism."""
    config = large(parallel__pipeline_size=2)
    assert derive(config).data_parallel_size == 1
    traffic = sent(config).pipeline
    assert traffic.step_bytes == 2 * 32 * RESIDUAL / 4
    assert (traffic.messages, traffic.stride) == (64, 4)
    virtual = sent(large(parallel__pipeline_size=2, parallel__virtual_pipeline_size=3)).pipeline
    assert virtual.step_bytes == 3 * traffic.step_bytes
    whole = sent(large(parallel__pipeline_size=2, parallel__sequence_parallel=False)).pipeline
    assert whole.step_bytes == 4 * traffic.step_bytes


def test_a_tied_embedding_is_summed_over_first_and_last_stage(large):
    rows = flops.padded_vocab_size(large().model, 4)
    tied = large(parallel__pipeline_size=2, model__tie_embeddings=True)
    assert sent(tied).embedding.step_bytes == 4 * rows * HIDDEN / 4
    assert sent(large(parallel__pipeline_size=2)).embedding.step_bytes == 0
    assert sent(large(model__tie_embeddings=True)).embedding.step_bytes == 0


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_all_parameters_between_them(large, tied):
    config = large(parallel__pipeline_size=4, parallel__tensor_size=1, model__tie_embeddings=tied)
    padded = flops.padded_vocab_size(config.model, 1)
    parameters = flops.count_parameters(config.model, padded)
    stages = [stage_parameters(config, parameters, padded, stage) for stage in range(4)]
    copy = padded * HIDDEN if tied else 0
    assert sum(stages) == parameters.total + copy
    assert stages[1] == stages[2] == 9 * parameters.per_layer
