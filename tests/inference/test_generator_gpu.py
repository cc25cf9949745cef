"""Generation on a GPU with the Triton kernels: near the whole text's logits, the same with a graph."""

import pytest
import torch

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import Device, Dtype, KernelImpl, PunctuationLanguage, PunctuationMatch
from phsa_megatron.inference.generator import Generator
from phsa_megatron.inference.sampling import Sampling
from phsa_megatron.model.factory import build_model
from phsa_megatron.parallel.groups import initialize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)
PROMPTS = [[(37 * i + 11 * n) % 100 for i in range(n)] for n in (1, 16, 130, 1000)]
NEW_TOKENS = 40
# Two layers of six bf16 results one after another, each within 2**-9, on both sides of the comparison.
TOLERANCE = 2 * 12 * 2.0**-9


class Recording(Generator):
    def _choose(self, logits, sampling, draws):
        self.logits = [*getattr(self, "logits", []), logits.float().clone()]
        return super()._choose(logits, sampling, draws)


@pytest.fixture
def ready(tiny_config):
    """Returns (config, model, groups) of a bf16 recipe at the kernels' shapes."""
    config = tiny_config(
        run__dtype=Dtype.bf16, cluster__device=Device.cuda, attention__impl=KernelImpl.triton,
        attention__block_tokens=16, attention__init_tokens=16, attention__local_tokens=64,
        model__head_dim=64, model__hidden_size=256, model__ffn_hidden_size=512,
    )  # fmt: skip
    groups = initialize(config)
    torch.manual_seed(5)
    (model,) = build_model(config, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    yield config, model, TABLE.to(groups.device)
    groups.close()


def from_scratch(config, model, table, tokens):
    ids = torch.tensor([tokens], device="cuda")
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32, device="cuda")
    positions = torch.arange(len(tokens), device="cuda").unsqueeze(0)
    logits = []
    hook = model.module.output_layer.register_forward_hook(
        lambda _m, _a, out: logits.append(out[0][:, 0, :100])
    )
    model.eval()
    with torch.no_grad():
        info = SideInfo.build(ids, bounds, table, config.attention, 2)
        model(ids, positions, None, packed_seq_params=info)
    hook.remove()
    return logits[-1].float()


def test_logits_are_near_those_of_the_whole_text(ready):
    config, model, table = ready
    generator = Recording(model, config, table, vocab_size=100)
    done = generator.generate(PROMPTS, Sampling(max_tokens=NEW_TOKENS))
    for row, (prompt, completion) in enumerate(zip(PROMPTS, done, strict=True)):
        whole = from_scratch(config, model, table, [*prompt, *completion.tokens])
        wanted = whole[len(prompt) - 1 : -1]
        mine = torch.stack([step[row] for step in generator.logits])
        # Near ties of blocks may fall either way, so that a few tokens may be far off: the median is held.
        error = (mine - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.median() < TOLERANCE, error
        off_by_one = (mine[1:] - wanted[:-1]).norm(dim=1) / wanted[:-1].norm(dim=1)
        assert off_by_one.median() > 0.2, "the comparison would not notice another token's logits"


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=NEW_TOKENS), Sampling(1.0, 0.9, 3, NEW_TOKENS)])
def test_a_graph_generates_the_same_tokens(ready, sampling):
    config, model, table = ready
    plain = Generator(model, config, table, vocab_size=100).generate(PROMPTS, sampling)
    captured = Generator(model, config, table, vocab_size=100, cuda_graph=True)
    assert captured.generate(PROMPTS, sampling) == plain
    fewer = Generator(model, config, table, vocab_size=100).generate(PROMPTS[:2], sampling)
    assert captured.generate(PROMPTS[:2], sampling) == fewer
