"""Packed documents equal separate ones, through a whole model."""

import pytest
import torch

from phsa_megatron.config.schema import AttentionKind
from phsa_megatron.model.factory import build_model

# Documents below a block, of whole blocks, of one token, and long ones with a choice of blocks.
BOUNDS = [0, 3, 35, 36, 80, 160, 160]


def _double_model(config, groups):
    """Returns a model in fp64, RoPE angles included, so that rounding is far below every real difference."""
    (model,) = build_model(config, groups)
    model.double()
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                5.0
            )  # at the usual init attention is nearly uniform, and a wrong mask nearly right
    return model


def _logits(model, config, batch):
    return model(batch.tokens, batch.positions, None, packed_seq_params=batch.side_info(config))


def _gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", list(AttentionKind))
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_equals_separate(tiny_config, single_process_groups, micro_batch, kind, rows):
    config = tiny_config(attention__kind=kind, data__seq_len_tokens=160)
    model = _double_model(config, single_process_groups)
    packed = micro_batch(BOUNDS, rows=rows)
    upstream = torch.randn(160, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    together = _logits(model, config, packed).reshape(160, -1)
    gradients = _gradients(model, (together * upstream).sum())

    apart = []
    for start, end in zip(BOUNDS, BOUNDS[1:], strict=False):
        if start == end:
            continue
        alone = micro_batch([0, end - start])
        alone.tokens = packed.tokens.reshape(1, -1)[:, start:end]
        apart.append(_logits(model, config, alone)[0])
    apart = torch.cat(apart)
    # fp64 rounding, amplified by two layers of depth-160 sums.
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11 * apart.abs().max().item())
    for name, expected in _gradients(model, (apart * upstream).sum()).items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-11 * scale, msg=name)

    # Negative control: as one document the same tokens give other logits.
    if rows == 1:
        packed.cu_seqlens = torch.tensor([0, 160], dtype=torch.int32)
        joined = _logits(model, config, packed)[0]
        assert (joined - apart).abs().max() > 1e-3 * apart.abs().max()


def test_fp32_packed_equals_separate_to_the_rounding_of_rope_angles(
    tiny_config, single_process_groups, micro_batch
):
    config = tiny_config(data__seq_len_tokens=160)
    (model,) = build_model(config, single_process_groups)
    packed = micro_batch(BOUNDS)
    together = _logits(model, config, packed)[0]
    for start, end in zip(BOUNDS[:-2], BOUNDS[1:-1], strict=True):
        alone = micro_batch([0, end - start])
        alone.tokens = packed.tokens[:, start:end]
        apart = _logits(model, config, alone)[0]
        # An angle of at most 160 rad is rounded by 160 * 2^-24; scores, values and sums add a few more bits.
        bound = 8 * 160 * 2**-24 * apart.abs().max().item()
        torch.testing.assert_close(together[start:end], apart, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", list(AttentionKind))
def test_a_later_token_changes_nothing_before_it(tiny_config, single_process_groups, micro_batch, kind):
    config = tiny_config(attention__kind=kind)
    model = _double_model(config, single_process_groups)
    batch = micro_batch([0, 64])
    before = _logits(model, config, batch)[0]
    for changed in (5, 31, 47, 63):
        other = micro_batch([0, 64])
        other.tokens[0, changed] = (other.tokens[0, changed] + 7) % 100
        after = _logits(model, config, other)[0]
        assert torch.equal(before[:changed], after[:changed])
        assert not torch.equal(before[changed:], after[changed:])


def test_phsa_that_covers_everything_is_the_dense_model(tiny_config, single_process_groups, micro_batch):
    wide = {"attention__init_tokens": 80, "attention__local_tokens": 80, "data__seq_len_tokens": 160}
    phsa = _double_model(tiny_config(**wide), single_process_groups)
    dense_config = tiny_config(attention__kind=AttentionKind.dense, **wide)
    dense = _double_model(dense_config, single_process_groups)
    dense.load_state_dict(phsa.state_dict())
    batch = micro_batch(BOUNDS)
    one, other = _logits(phsa, tiny_config(**wide), batch), _logits(dense, dense_config, batch)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * other.abs().max().item())
    sparse = _logits(phsa, tiny_config(), batch)
    assert torch.equal(sparse, one), "the module's windows count, not those of the side information"


def test_inference_may_use_another_k(tiny_config, single_process_groups, micro_batch):
    config = tiny_config(data__seq_len_tokens=160)
    model = _double_model(config, single_process_groups)
    batch = micro_batch([0, 160])

    def at(topk):
        return model(batch.tokens, batch.positions, None, packed_seq_params=batch.side_info(config, topk))

    assert (at(1) - at(99)).abs().max() > 1e-4
