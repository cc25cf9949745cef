"""A model and its data, stepped by hand, and all that a step changes."""

import torch

from phsa_megatron.data.batches import BatchReader
from phsa_megatron.data.tokenizer import Tokenizer
from phsa_megatron.training.faults import Faults
from phsa_megatron.training.optimizer import build_parts
from phsa_megatron.training.progress import Progress
from phsa_megatron.training.run import punctuation_table
from phsa_megatron.training.state import TrainState
from phsa_megatron.training.step import micro_batch_starts, train_step


class Bench:
    """A model and its data, stepped by hand."""

    def __init__(self, config, groups):
        self.parts = build_parts(config, groups)
        tokenizer = Tokenizer.from_file(config.data.tokenizer_file, config.data.eod_token)
        self.reader = BatchReader(config, "train", tokenizer)
        self.table = punctuation_table(config, tokenizer, groups)
        self.state = TrainState()
        self.config, self.groups = config, groups

    def batches(self):
        starts = micro_batch_starts(self.config, self.groups, self.state.consumed_sequences)
        return [self.reader.micro_batch(first, self.config.optim.micro_batch_sequences) for first in starts]

    def step(self, faults=None):
        return train_step(
            self.parts, self.batches(), self.table, self.state, Progress(faults=faults or Faults())
        )

    def snapshot(self):
        weights = [p.detach().clone() for _, p in self.parts.named_parameters()]
        masters = [p.detach().clone() for g in self.parts.optimizer.param_groups for p in g["params"]]
        (optimizer,) = self.parts.optimizer.chained_optimizers
        moments = [
            state[key].clone()
            for state in optimizer.optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ]
        counters = [g.get("step") for g in optimizer.optimizer.param_groups]
        return weights + masters + moments, counters


def same(first, second):
    (tensors, counters), (other_tensors, other_counters) = first, second
    return (
        len(tensors) == len(other_tensors)
        and all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))
        and counters == other_counters
    )
