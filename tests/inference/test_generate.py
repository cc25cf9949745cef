import pytest
import torch

from phsa_megatron.attention.punctuation import PunctuationTable
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.schema import PunctuationLanguage, PunctuationMatch
from phsa_megatron.inference.generate import _choose, generate
from phsa_megatron.model.factory import build_model

TABLE = PunctuationTable.build(
    ["." if token % 7 == 0 else "a" for token in range(100)], PunctuationMatch.exact, PunctuationLanguage.en
)
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture
def ready(tiny_config, single_process_groups):
    """Returns (model, function that generates with it), for a recipe."""

    def build(**overrides):
        config = tiny_config(**overrides)
        torch.manual_seed(5)
        model = build_model(config, single_process_groups)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.mul_(3.0)

        def run(num_tokens=5, prompt=PROMPT, **kwargs):
            kwargs = {"vocab_size": 100, **kwargs}
            return generate(
                model,
                prompt,
                num_tokens,
                config=config,
                groups=single_process_groups,
                table=TABLE,
                **kwargs,
            )

        return config, model[0], run

    return build


@pytest.mark.parametrize("mtp", [0, 1])
def test_greedy_takes_the_most_likely_token_of_an_unpadded_forward(ready, mtp):
    config, model, run = ready(model__mtp_num_layers=mtp)
    tokens = list(PROMPT)
    model.eval()
    for _ in range(5):
        ids = torch.tensor([tokens])
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        logits = []
        hook = model.output_layer.register_forward_hook(lambda _m, _a, out, kept=logits: kept.append(out[0]))
        with torch.no_grad():
            model(
                ids,
                torch.arange(len(tokens)).unsqueeze(0),
                None,
                labels=ids,
                packed_seq_params=SideInfo.build(ids, bounds, TABLE, config.attention, 2),
            )
        hook.remove()
        tokens.append(int(logits[-1][-1, 0, :100].argmax()))
    assert run() == tokens[len(PROMPT) :]
    assert len(set(tokens[len(PROMPT) :])) > 1, "one token repeated shows little"


def test_prompts_across_the_padding_boundary_agree(ready):
    _, _, run = ready()
    longer = run(8, prompt=PROMPT * 7)
    assert longer[4:] == run(4, prompt=PROMPT * 7 + longer[:4])


def test_sampling_is_repeatable_and_seeded(ready):
    _, _, run = ready()
    assert run(20, temperature=2.0, seed=1) == run(20, temperature=2.0, seed=1)
    assert run(20, temperature=2.0, seed=1) != run(20, temperature=2.0, seed=2)


def test_training_state_is_left_alone(ready):
    _, model, run = ready()
    model.train()
    model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    weights = [p.detach().clone() for p in model.parameters()]
    run(3, temperature=1.0)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


def test_it_stops_after_the_end_of_document(ready):
    _, _, run = ready()
    full = run(6)
    assert run(6, eod_id=full[2]) == full[: full.index(full[2]) + 1]


def test_padding_rows_of_the_vocabulary_are_never_generated(ready):
    _, _, run = ready()
    assert set(run(20, temperature=50.0, vocab_size=3)) <= {0, 1, 2}


def test_infer_topk_is_used(ready):
    prompt = [token % 100 for token in range(0, 999, 7)]
    results = [tuple(ready(attention__infer_topk=k)[2](12, prompt=prompt)) for k in (1, 99, 99)]
    assert results[1] == results[2] and results[0] != results[1]


def test_equal_logits_give_the_lowest_id():
    assert _choose(torch.tensor([0.0, 2.0, 2.0]), 0.0, torch.Generator()).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"num_tokens": -1}, "must not be negative"),
        ({"vocab_size": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused(ready, arguments, message):
    with pytest.raises(ValueError, match=message):
        ready()[2](**arguments)
