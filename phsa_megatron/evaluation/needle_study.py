"""Needle scores of selectors: every trial of a text is read once and asked with each selector and k.

prefill = dense: the text before the question is read with dense attention, once, and the question with the
selector. prefill = sparse: everything is read with the selector. All selectors see the same trials. A cell is
a line {prefill, text, num_tokens, selector, topk, first_trial, num_digits: [right digits of each trial]}.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from phsa_megatron.evaluation.needles import NUM_DIGITS, Needle, make_needle
from phsa_megatron.evaluation.probe_attention import Probe
from phsa_megatron.evaluation.probe_model import Attend, KeysAndValues, ProbeModel, attend_densely
from phsa_megatron.evaluation.study_setup import Cell, Study, cells_of, progress
from phsa_megatron.evaluation.study_texts import TEXTS

WINDOWS = 16, 128
"""Init and local tokens: small, so that the needle is not in them."""


@dataclass(frozen=True)
class _Batch:
    """Trials of one text and length that are read together, and what is to be measured of them."""

    prefill: str
    text: str
    num_tokens: int
    trials: range
    wanted: list[Cell]


def run_needles(arguments: argparse.Namespace) -> None:
    """Measure the trials of each text and length with every selector and k, and with dense attention."""
    study = Study(arguments, "needles")
    batches = _batches(study, arguments)
    steps = [(batch, cell) for batch in batches for cell in batch.wanted]
    if not steps:
        return
    reader: Reader | None = None
    current: _Batch | None = None
    for batch, cell in progress(steps, f"needles, {arguments.device}"):
        if study.deadline.has_passed():
            print("needles: out of time; the same command goes on from here", flush=True)
            return
        ids, sha256 = study.text(batch.text)
        if batch is not current:
            reader = None  # its keys and values go before the next are made
            needles = [make_needle(study.tokenizer, ids, batch.num_tokens, n) for n in batch.trials]
            reader, current = Reader(study, needles, batch.prefill), batch
        assert reader is not None
        found = reader.digits(cell)
        record = {
            "prefill": batch.prefill,
            "text": batch.text,
            "text_sha256": sha256,
            "num_tokens": batch.num_tokens,
            "windows": list(WINDOWS),
            "selector": cell[0],
            "topk": cell[2],
            "first_trial": batch.trials.start,
            "num_digits": found,
        }
        study.keep([record])


def _batches(study: Study, arguments: argparse.Namespace) -> list[_Batch]:
    """Return what is not measured yet, short contexts first."""
    done = {
        (c["prefill"], c["text"], c["num_tokens"], c["selector"], c["topk"], c["first_trial"] + i)
        for c in study.done
        for i in range(len(c["num_digits"]))
    }
    batches = []
    for num_tokens in sorted(arguments.tokens):
        for text in arguments.texts:
            cells: list[Cell] = [("dense", None, 0)] if "dense" in arguments.selectors else []
            cells += cells_of(WINDOWS, TEXTS[text][0], arguments.selectors, arguments.topk)
            for first in range(0, arguments.trials, arguments.batch):
                trials = range(first, min(first + arguments.batch, arguments.trials))
                wanted = [
                    (name, settings, k)
                    for name, settings, k in cells
                    if any((arguments.prefill, text, num_tokens, name, k, n) not in done for n in trials)
                ]
                if wanted:
                    batches.append(_Batch(arguments.prefill, text, num_tokens, trials, wanted))
    return batches


class Reader:
    """Trials whose texts have been read, as far as that does not depend on the selector."""

    def __init__(self, study: Study, needles: Sequence[Needle], prefill: str) -> None:
        """Read the texts.

        Args:
            study: model and punctuation tables.
            needles: of one length.
            prefill: 'dense' or 'sparse'.
        """
        self._study = study
        self._count = len(needles)
        # Those of one split are read together.
        order = sorted(range(len(needles)), key=lambda i: len(needles[i].prefix))
        groups = groupby(order, key=lambda i: len(needles[i].prefix))
        self._groups = [
            _Group(study, [needles[i] for i in members], members, prefill)
            for members in (list(group) for _, group in groups)
        ]

    def digits(self, cell: Cell) -> list[int]:
        """Return how many of its digits each trial gets right under a selector, in their order."""
        right = [0] * self._count
        for group in self._groups:
            wanted = group.digits
            found = group.logits(cell).argmax(-1)
            for place, number in zip(group.members, (found == wanted).sum(-1).tolist(), strict=True):
                right[place] = int(number)
        return right

    def logits(self, cell: Cell) -> Tensor:
        """Return fp32 [trials, digits, vocabulary] before each digit, on the CPU."""
        parts = [group.logits(cell).cpu() for group in self._groups]
        undo = torch.tensor([i for group in self._groups for i in group.members]).argsort()
        return torch.cat(parts)[undo]


class _Group:
    """Trials of one length whose questions are as long as each other's."""

    def __init__(self, study: Study, needles: list[Needle], members: list[int], prefill: str) -> None:
        self.members = members
        self._study, self._model = study, study.model
        self._whole = torch.tensor([n.prefix + n.question for n in needles], device=study.device)
        self.digits = torch.tensor([n.digits for n in needles], device=study.device)
        self._start = len(needles[0].prefix) if prefill == "dense" else 0
        self._before: KeysAndValues | None = None
        if self._start:
            _, self._before = self._model.read(self._whole[:, : self._start])
        self._probes: dict[str, Probe] = {}

    def logits(self, cell: Cell) -> Tensor:
        name, settings, topk = cell
        attend: Attend = attend_densely
        if settings is not None:
            if name not in self._probes:
                self._probes = {name: self._study.probe(self._whole, settings)}
            attend = without_layer(self._probes[name], max(topk, 1))
        return answer_logits(self._model, self._whole[:, self._start :], self._before, attend)


def answer_logits(model: ProbeModel, tokens: Tensor, before: KeysAndValues | None, attend: Attend) -> Tensor:
    """Return fp32 [b, digits, vocabulary]: the logits before each digit of texts int64 [b, n]."""
    hidden, _ = model.read(tokens, before, attend, keeps=False)
    return model.logits(hidden[:, -NUM_DIGITS - 1 : -1])


def without_layer(probe: Probe, topk: int) -> Attend:
    """Return a probe's attention, equal in all layers."""
    return lambda layer, query, keys, values: probe.attend(topk, query, keys, values)
