from __future__ import annotations

import numpy as np
import pytest
import torch

from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training.evaluate import Evaluator, Loss
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.state import capture_rng, rng_digest


@pytest.fixture
def made(tiny_config, open_groups):
    def make(**overrides):
        config = tiny_config(**overrides)
        groups = open_groups(config)
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        table = punctuation_table(config, tokenizer, groups)
        return build_parts(config, groups), Evaluator(config, groups, tokenizer, table), tokenizer

    return make


def _never():
    return False


def test_units_of_the_loss():
    loss = Loss(nats=10 * np.log(2.0), num_tokens=5, num_bytes=20)
    assert loss.nats_per_token == pytest.approx(2 * np.log(2.0))
    assert loss.bits_per_byte == pytest.approx(0.5)


def test_every_domain_is_measured_over_its_own_tokens_and_bytes(made):
    parts, evaluator, tokenizer = made()
    evaluation = evaluator.run(parts, _never)
    batch = evaluator.reader.micro_batch(0, evaluator.reader.num_sequences)
    assert batch.domains == ["en"] * 3 + ["zh"] * 3
    counted = batch.loss_mask > 0
    for domain, rows in (("en", slice(0, 3)), ("zh", slice(3, 6))):
        labels = batch.labels[rows][counted[rows]]
        loss = evaluation.domains[domain]
        assert loss.num_tokens == len(labels)
        # No piece of these ASCII texts is cut inside a character, and the end of a document is no text.
        text = tokenizer.decode([i for i in labels.tolist() if i != tokenizer.eod_id])
        assert loss.num_bytes == len(text.encode())
    assert evaluation.total.num_tokens == int(counted.sum())


def test_micro_batches_do_not_change_the_result(made):
    first = {}
    for size in (1, 2, 4):
        parts, evaluator, _ = made(**{"evaluate.micro_batch_sequences": size})
        evaluation = evaluator.run(parts, _never)
        values = {name: value for name, value in evaluation.metrics().items() if name != "val/eval_s"}
        first = first or values
        assert values == pytest.approx(first, rel=1e-6)


def test_evaluation_uses_the_inference_topk(made):
    losses = []
    for topk in (1, 3):
        parts, evaluator, _ = made(**{"attention.infer_topk": topk})
        losses.append(evaluator.run(parts, _never).total.nats)
    assert losses[0] != losses[1]


def test_nothing_is_changed(made):
    parts, evaluator, _ = made()
    torch.rand(3)
    rng = rng_digest(capture_rng())
    weights = [p.detach().clone() for _, p in parts.named_parameters()]
    gradients = [gradient.clone() for _, gradient in parts.gradient_sums()]
    first = evaluator.run(parts, _never)
    second = evaluator.run(parts, _never)
    assert first.domains == second.domains
    assert rng_digest(capture_rng()) == rng
    assert parts.model[0].training
    assert all(torch.equal(a, p) for a, (_, p) in zip(weights, parts.named_parameters(), strict=True))
    assert all(
        torch.equal(a, p.main_grad) for a, (_, p) in zip(gradients, parts.named_parameters(), strict=True)
    )


def test_a_request_to_leave_ends_it_and_still_puts_the_mode_back(made):
    parts, evaluator, _ = made()
    answers = iter([False, True])
    assert evaluator.run(parts, lambda: next(answers)) is None
    assert parts.model[0].training


def test_selection_is_measured_for_phsa_and_not_for_dense(made):
    name = "attention/frac_queries_with_more_candidates_than_k"
    parts, evaluator, _ = made()
    assert 0 < evaluator.run(parts, _never).selection[name] < 1
    parts, evaluator, _ = made(**{"attention.kind": "dense"})
    assert evaluator.run(parts, _never).selection == {}
