"""Both kinds of answerers say what a plain forward pass of their model says."""

import pytest
import torch

from phsa_megatron import generate as generate_command
from phsa_megatron.attention.side_info import SideInfo
from phsa_megatron.config.errors import CheckpointError, ConfigError
from phsa_megatron.evaluation.information_loss import attending
from phsa_megatron.evaluation.tasks.answerer import Request
from phsa_megatron.evaluation.tasks.checkpoint_answerer import open_run
from phsa_megatron.evaluation.tasks.transformers_answerer import TransformersAnswerer
from phsa_megatron.inference.generate import generate

TEXT = "the amber canoe, so the red owl. and the blue lamp; the vast meadow and so"


def chained(answerer, ids, first):
    """Log-probabilities of ids[first:], each from a request of its own."""
    return torch.cat([answerer.score([Request(ids[: i + 1], i)])[0].logprobs for i in range(first, len(ids))])


def from_scratch(answerer, ids, num_tokens, attention=None):
    """What the sampler of training says, with a whole forward pass for each token."""
    with attending([answerer._model], attention or answerer.attention):
        return generate(
            [answerer._model], ids, num_tokens, config=answerer._config, groups=answerer._groups,
            table=answerer._table, vocab_size=answerer._tokenizer.vocab_size, eod_id=answerer.eod_id,
        )  # fmt: skip


@pytest.fixture(params=[0, 1], ids=["", "mtp"])
def opened(request, make_run):
    with open_run(make_run(f"run_mtp{request.param}", mtp=request.param)) as run:
        yield run


def test_scores_are_those_of_the_models_own_forward_pass(opened):
    answerer = opened.answerer()
    ids = answerer.encode(TEXT)
    model, seen = opened._model, []
    tokens = torch.tensor([ids])
    side_info = SideInfo.build(
        tokens, torch.tensor([0, len(ids)], dtype=torch.int32), answerer._table, answerer.attention, 2
    )
    # A copy: megatron's cross-entropy works in place.
    hook = model.output_layer.register_forward_hook(
        lambda _m, _a, out: seen.append(out[0][:, 0, :500].clone())
    )
    with torch.no_grad():
        model(tokens, torch.arange(len(ids))[None], None, labels=tokens, packed_seq_params=side_info)
    hook.remove()
    expected = seen[-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    for first in (1, 17):
        logprobs, is_greedy = answerer.score([Request(ids, first)])[0]
        torch.testing.assert_close(logprobs, expected[first - 1 :], rtol=1e-4, atol=1e-4)
        assert is_greedy.tolist() == (seen[-1].argmax(-1)[first - 1 : -1] == tokens[0, first:]).tolist()
    assert not torch.allclose(logprobs, expected[15:-1], atol=1e-2)


def test_documents_in_one_row_do_not_see_each_other(opened):
    answerer = opened.answerer()
    texts = [TEXT, "so and " * 40, TEXT[::-1], TEXT]
    requests = [Request(answerer.encode(text), 3) for text in texts]
    together = answerer.score(requests)
    for request, (logprobs, is_greedy) in zip(requests, together, strict=True):
        alone = answerer.score([request])[0]
        torch.testing.assert_close(logprobs, alone.logprobs, rtol=1e-4, atol=1e-4)
        assert torch.equal(is_greedy, alone.is_greedy)
    assert not torch.allclose(together[1].logprobs[:5], together[0].logprobs[:5], atol=1e-2)


def test_what_it_generates_is_greedy_and_stops(opened):
    answerer = opened.answerer()
    ids = answerer.encode(TEXT)
    new = answerer.continued(ids, 6)
    assert new == from_scratch(answerer, ids, 6)
    assert answerer.score([Request(ids + new, len(ids))])[0].is_greedy.all()
    worse = [*new[:-1], (new[-1] + 1) % 400 + 1]
    assert not answerer.score([Request(ids + worse, len(ids))])[0].is_greedy.all()
    (text,) = answerer.generate([TEXT], 20)
    stop = text[len(text) // 2 :][:3]
    assert answerer.generate([TEXT], 20, [stop, "never there"]) == [text[: text.index(stop)]]


def test_with_a_cache_it_says_what_it_says_without(make_run, capsys):
    """The run's own k, others, dense attention and other selectors, on the same layers."""
    said = {}
    with open_run(make_run("run_mtp0")) as run:
        for way in [("own", 1), ("own", 999), ("dense", None), ("mean_pool", 3), ("window", None)]:
            answerer = run.answerer(*way)
            ids = answerer.encode(TEXT)
            said[way] = answerer.continued(ids, 9)
            assert said[way] == from_scratch(answerer, ids, 9) and answerer.without_cache is None
            if way[0] == "dense":  # layers that are told nothing would select
                assert said[way] != from_scratch(answerer, ids, 9, run.config.attention)
    assert said["own", 1] != said["own", 999] == said["dense", None] != said["window", None]
    assert capsys.readouterr().err == ""


def test_the_runs_infer_topk_and_dense_layers_hold_with_a_cache(make_run):
    with open_run(make_run("layers", infer_topk=5, dense_layers=[2])) as run:
        answerer = run.answerer()
        ids = answerer.encode(TEXT * 2)
        said = answerer.continued(ids, 12)
        assert answerer._generator.topk == 5 and said == from_scratch(answerer, ids, 12)
        assert said != run.answerer(topk=1).continued(ids, 12)
        answerer._config.attention.dense_layers = []
        assert said != from_scratch(answerer, ids, 12)


def test_selectors_without_a_cache_say_so_and_others_on_their_layers_have_one(make_run, capsys):
    learned = {"selector": "indexer", "mean_weight_frac": 1.0, "group_score": "raw_sum"}
    folder = make_run("indexer", **learned)
    with open_run(folder) as run:
        own, other = run.answerer(), run.answerer("mean_pool")
        ids = own.encode(TEXT * 2)
        assert own.continued(ids, 1)
        assert own.continued(ids, 3) == from_scratch(own, ids, 3)
        err = capsys.readouterr().err
        assert err.count("generated without a cache: attention.selector=indexer: generation with a") == 1
        assert other.continued(ids, 5) == from_scratch(other, ids, 5)
        assert own.without_cache is not None and other.without_cache is None
    assert generate_command.main([str(folder), "--prompt", "so and"]) == 2
    assert "attention.selector=indexer: generation with a cache keeps two" in capsys.readouterr().err


def test_a_continuation_is_scored_with_the_space_before_it(opened):
    answerer = opened.answerer()
    whole = answerer.loglikelihood("the amber canoe", " and so")
    assert answerer.loglikelihood("the amber canoe ", "and so") == whole
    ids = answerer.encode("the amber canoe and so")
    first = len(answerer.encode("the amber canoe"))
    assert whole.num_tokens == len(ids) - first
    assert whole.nats == pytest.approx(chained(answerer, ids, first).sum().item(), abs=1e-3)


def test_an_empty_context_is_the_start_of_a_document(opened):
    answerer = opened.answerer()
    ids = [answerer.eod_id, *answerer.encode("so and")]
    assert answerer.loglikelihood("", "so and").nats == pytest.approx(
        chained(answerer, ids, 1).sum().item(), abs=1e-3
    )


def test_selectors_and_k_share_one_model_and_differ(make_run):
    with open_run(make_run("run_mtp0")) as run:
        views = {
            (selector, k): run.answerer(selector, k)
            for selector, k in [("own", None), ("own", 1), ("own", 999), ("dense", None), ("mean_pool", 2)]
        }
        ids = views["dense", None].encode(TEXT * 4)
        found = {key: view.score([Request(ids, 1)])[0].logprobs for key, view in views.items()}
        again = views["own", None].score([Request(ids, 1)])[0].logprobs
        generated = {key: view.generate([TEXT * 4], 8)[0] for key, view in views.items()}
    assert torch.equal(found["own", None], again)
    # All blocks are dense attention; few are not.
    torch.testing.assert_close(found["own", 999], found["dense", None], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["own", 1], found["dense", None], atol=1e-2)
    assert generated["own", 999] == generated["dense", None]
    labels = {key: (v.selector, v.topk, v.train_topk) for key, v in views.items()}
    assert labels["own", None] == ("phsa", 2, 2) and labels["own", 1] == ("phsa", 1, 2)
    assert labels["dense", None] == ("dense", None, 2) and labels["mean_pool", 2] == ("mean_pool", 2, 2)
    assert len({view.name for view in views.values()}) == len(views)


def test_a_text_beyond_the_training_length_is_refused_and_can_be_allowed(make_run):
    with open_run(make_run("run_mtp0")) as run:
        with pytest.raises(ConfigError, match=r"has [\d,]+ tokens, and this model takes 512.*max_tokens="):
            run.answerer().generate(["so" * 600], 8)
        with pytest.raises(ConfigError, match="takes 512"):
            run.answerer().score([Request([5] * 513, 1)])
        assert len(run.answerer(max_tokens=1024).score([Request([5] * 513, 1)])[0].logprobs) == 512


def test_wrong_runs_are_refused(make_run, tmp_path):
    for path, error, message in [
        (tmp_path, ConfigError, "is no run folder: it has no config.yaml"),
        (make_run("run_mtp0"), CheckpointError, "no committed checkpoint of step 3; it has: 7"),
    ]:
        with pytest.raises(error, match=message), open_run(path, step=3):
            pass
    with open_run(make_run("run_mtp0")) as run:
        with pytest.raises(ConfigError, match="Did you mean mean_pool"):
            run.answerer("mean_poll")
        with pytest.raises(ConfigError, match="topk=0 must be at least 1"):
            run.answerer(topk=0)
    nsa = {"selector": "nsa", "mean_weight_frac": 1.0, "nsa_window_tokens": 16, "block_tokens": 16}
    with open_run(make_run("nsa", **nsa, init_tokens=16, local_tokens=16)) as run:
        assert run.answerer().without_cache.startswith("attention.selector=nsa: generation with a cache")
        with pytest.raises(ConfigError, match="selector=nsa, whose layers have no full attention"):
            run.answerer("dense")


@pytest.fixture(scope="module")
def transformers_folder(tokenizer_file, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


def test_a_transformers_folder_answers_alike(transformers_folder):
    from transformers import LlamaForCausalLM

    answerer = TransformersAnswerer(transformers_folder)
    ids = answerer.encode(TEXT)
    assert answerer.decode(ids) == TEXT and answerer.max_tokens == 512
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(transformers_folder).eval()(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    logprobs = answerer.score([Request(ids, 1)])[0].logprobs
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        answerer.score([Request(ids, 9)])[0].logprobs, expected[8:], rtol=1e-4, atol=1e-4
    )
    new = answerer.continued(ids, 6)
    assert answerer.score([Request(ids + new, len(ids))])[0].is_greedy.all()
    with pytest.raises(ConfigError, match="takes 512"):
        answerer.generate([TEXT * 40], 8)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config.json"):
        TransformersAnswerer(tmp_path)
