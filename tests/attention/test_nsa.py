"""NSA as a layer's core attention: three gated branches in fp64, packed documents, what it refuses."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from phsa_kernels.api import token_positions
from phsa_kernels.nsa import Compression, compressed_attention, turn
from phsa_megatron.attention.layer_input import LayerInput
from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch, Selector
from phsa_megatron.model.factory import build_model

S, B, M, WINDOW = 160, 2, 16, 24
BOUNDS = [0, 7, 160, 161, 318, 320, 320]
HEADS, KV, D, HIDDEN = 6, 2, 8, 48
TABLE = PunctuationTable.build(
    ["." if token % 5 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)
SETTINGS = {
    "attention__selector": Selector.nsa,
    "attention__mean_weight_frac": 1.0,
    "attention__block_tokens": M,
    "attention__init_tokens": M,
    "attention__local_tokens": 2 * M,
    "attention__nsa_window_tokens": WINDOW,
    "data__seq_len_tokens": S,
}


@pytest.fixture
def model(tiny_config, single_process_groups):
    (model,) = build_model(tiny_config(**SETTINGS), single_process_groups)
    return model


def _core(model):
    core = model.decoder.layers[0].self_attention.core_attention.double()
    core.heads.key_gain.data.normal_(generator=torch.Generator().manual_seed(3))  # zeros would hide it
    return core


class Listener:
    def record(self, layer_number, query, key, value, ids, lse, side_info, tokens=None, block_slot=None):
        self.ids = ids


def _side_info(core, hidden=None, bounds=BOUNDS, rows=B):
    tokens = torch.randint(0, 100, (rows, bounds[-1] // rows), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    side = SideInfo.build(tokens, cu_seqlens, TABLE, core.attention, 2, Listener())
    if hidden is not None:
        side.layer_input = LayerInput(hidden, _angles(len(hidden)))
    return side


def _angles(length):
    return RotaryEmbedding(D, 1.0, rotary_base=10000, use_cpu_initialization=True)(length).double()


def _inputs():
    g = torch.Generator().manual_seed(1)
    shapes = [(S, B, HEADS, D), (S, B, KV, D), (S, B, KV, D), (S, B, HIDDEN)]
    return [torch.randn(s, dtype=torch.float64, generator=g, requires_grad=True) for s in shapes]


def _flat(x):
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])


def _masked(q, k, v, allowed):
    """Softmax attention over a mask [heads, T, T]."""
    k, v = (x.repeat_interleave(HEADS // KV, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * D**-0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def _masks(ids):
    """Which keys the selected branch and the window see, key by key."""
    selected = torch.zeros(HEADS, S * B, S * B, dtype=torch.bool)
    window = torch.zeros_like(selected)
    for start, end in zip(BOUNDS[:-1], BOUNDS[1:], strict=True):
        for i in range(end - start):
            window[:, start + i, start + max(0, i - WINDOW + 1) : start + i + 1] = True
            for head in range(HEADS):
                chosen = {*ids[start + i, head * KV // HEADS].tolist(), 0, i // M, i // M - 1}
                for b in chosen - {-1}:
                    selected[head, start + i, start + b * M : start + min((b + 1) * M, i + 1)] = True
    return selected, window


def _turned(x):
    """RoPE as rotations of complex numbers."""
    angle = _angles(S)[:, :, :, : D // 2]
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def _by_masks(core, q, k, v, hidden, ids):
    """The three branches and their gates, from the weights' definition, head by head."""
    gate, kv, heads = core.linear_gate.weight, core.linear_kv.weight, core.heads
    branches = []
    for branch in range(2):
        keys, values = [], []
        for head in range(KV):
            rows = [(head * 4 + branch * 2 + what) * D for what in range(2)]
            key, value = (hidden @ kv[row : row + D].T for row in rows)
            key = key / (key.square().mean(-1, keepdim=True) + core.norm_eps).sqrt()
            keys.append(key * (1 + heads.key_gain[head, branch]))
            values.append(value)
        keys = torch.stack(keys, 2)
        branches.append((_flat(_turned(keys) if branch else keys), _flat(torch.stack(values, 2))))
    q, k, v = _flat(q), _flat(k), _flat(v)
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    compressed, chosen = compressed_attention(
        q,
        *branches[0],
        *(
            Compression(*(getattr(heads, f"{what}_{name}") for name in Compression._fields))
            for what in ("key", "value")
        ),
        *token_positions(cu_seqlens, S * B),
        cu_seqlens,
        topk=2,
        init_tokens=M,
        local_tokens=2 * M,
        block_tokens=M,
        angles=_angles(S).flatten(1).repeat(B, 1),
    )
    assert torch.equal(chosen, ids)
    selected, window = _masks(ids)
    outs = compressed, _masked(q, k, v, selected), _masked(q, *branches[1], window)
    total = 0
    for branch, out in enumerate(outs):
        gates = torch.stack([_flat(hidden) @ gate[h * 3 + branch] for h in range(HEADS)], 1)
        total = total + torch.sigmoid(gates)[..., None] * out
    return total.reshape(B, S, -1).transpose(0, 1)


def test_output_and_gradients_are_those_of_three_masked_branches(model):
    core, (q, k, v, hidden) = _core(model), _inputs()
    side = _side_info(core, hidden)
    out = core(q, k, v, None, packed_seq_params=side)
    expected = _by_masks(core, q, k, v, hidden, side.recorder.ids)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-13)
    leaves = [q, k, v, hidden, *core.parameters()]
    upstream = torch.randn_like(out)
    found, wanted = (torch.autograd.grad(x, leaves, upstream) for x in (out, expected))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11 * other.abs().max().item())
    other_ids = torch.where(side.recorder.ids > 1, side.recorder.ids - 1, side.recorder.ids)
    selected, _ = _masks(other_ids)
    assert not torch.equal(selected, _masks(side.recorder.ids)[0])


def test_rope_is_megatrons_own(model):
    x, angles = torch.randn(S, B, KV, D, dtype=torch.float64), _angles(S)
    megatrons = apply_rotary_pos_emb(x, angles, config=model.config)
    assert torch.equal(turn(_flat(x), LayerInput(x, angles).token_angles()), _flat(megatrons))


def test_a_document_never_sees_another_and_no_future_token(model):
    core, inputs = _core(model), _inputs()
    before = core(*inputs[:3], None, packed_seq_params=_side_info(core, inputs[3]))
    with torch.no_grad():
        for x in inputs:
            x[100:, 0] = 50.0  # inside document 1
    after = core(*inputs[:3], None, packed_seq_params=_side_info(core, inputs[3]))
    assert torch.equal(before[:100, 0], after[:100, 0]) and torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[100:, 0], after[100:, 0])


def test_all_weights_of_a_model_have_gradients_and_documents_are_packed_exactly(model):
    model = model.double()
    tokens = torch.randint(0, 100, (1, S), generator=torch.Generator().manual_seed(5))
    settings = model.decoder.layers[0].self_attention.core_attention.attention

    def losses(tokens, bounds):
        positions = torch.arange(tokens.shape[1])[None]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        side = SideInfo.build(tokens, cu_seqlens, TABLE, settings, 2)
        return model(tokens, positions, None, labels=tokens, packed_seq_params=side)

    packed = losses(tokens, [0, 61, S])
    alone = torch.cat([losses(tokens[:, a:b], [0, b - a]) for a, b in ((0, 61), (61, S))], 1)
    # RoPE goes on at the second document. Its angles are fp32: of up to 160 radians, each is off by up to
    # 2^-17, which moves scores by about as much.
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    joined = losses(tokens, [0, S])
    assert not torch.allclose(packed[:, 80:], joined[:, 80:], rtol=1e-3)
    packed.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_what_it_cannot_do_is_refused(model, tiny_config, single_process_groups):
    core, (q, k, v, hidden) = _core(model), _inputs()
    with pytest.raises(TypeError, match="layer 1 got no input"):
        core(q, k, v, None, packed_seq_params=_side_info(core))
    side = _side_info(core, hidden)
    side.is_dense = True
    with pytest.raises(ConfigError, match="no full attention"):
        core(q, k, v, None, packed_seq_params=side)
    config = tiny_config(**SETTINGS | {"attention__nsa_window_tokens": None})
    with pytest.raises(ConfigError, match="needs attention.nsa_window_tokens"):
        build_model(config, single_process_groups)
