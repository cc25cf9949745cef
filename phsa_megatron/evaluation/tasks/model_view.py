"""The models of one evaluation: each folder, opened once, in every way of attending that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.flops import last_token_sparsity_frac, mean_sparsity_frac
from phsa_megatron.config.run_folder import RunFolder
from phsa_megatron.config.schema import AttentionConfig
from phsa_megatron.evaluation.tasks.answerer import Answerer
from phsa_megatron.evaluation.tasks.settings import EvalSettings


@dataclass(frozen=True)
class View:
    """One model with one way of attending.

    Attributes:
        answerer: asked.
        model: its folder.
        step: of the checkpoint; None for a transformers folder.
        selector: what chooses blocks; the attention's name for a transformers folder.
        train_topk: k in training; None where training selected nothing.
        infer_topk: k here; None where nothing is selected.
        attention: settings of a checkpoint's layers; None for a transformers folder or dense attention.
        without_cache: why texts are generated without a cache; None where there is one.
    """

    answerer: Answerer
    model: str
    step: int | None
    selector: str
    train_topk: int | None
    infer_topk: int | None
    attention: AttentionConfig | None
    without_cache: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What its samples are filed under; the settings of the layers are a part of it."""
        settings = None if self.attention is None else str(sorted(asdict(self.attention).items()))
        return self.model, self.step, self.selector, self.infer_topk, settings

    @property
    def labels(self) -> dict[str, Any]:
        """What a record says about it."""
        return {
            "name": self.answerer.name,
            "model": self.model,
            "step": self.step,
            "selector": self.selector,
            "train_topk": self.train_topk,
            "infer_topk": self.infer_topk,
            "without_cache": self.without_cache,
        }

    def sparsity(self, num_tokens: int) -> dict[str, float]:
        """Return the sparsity at a length by both definitions; 0 for dense attention."""
        if self.attention is None:
            return {"last_token_frac": 0.0, "mean_frac": 0.0}
        topk = 0 if self.infer_topk is None else self.infer_topk
        return {
            "last_token_frac": last_token_sparsity_frac(num_tokens, self.attention, topk),
            "mean_frac": mean_sparsity_frac(num_tokens, self.attention, topk),
        }


@contextmanager
def views_of(folder: Path, settings: EvalSettings) -> Iterator[list[View]]:
    """Open a folder and yield its views; each differs from the others.

    Raises:
        PhsaError: it is neither a run nor a transformers folder, or cannot be used as asked.
    """
    if RunFolder(folder).config_file.is_file():
        with _of_run(folder, settings) as views:
            yield views
    elif (folder / "config.json").is_file():
        yield [_of_transformers(folder, settings)]
    else:
        raise ConfigError(
            f"{folder} is neither a run folder (config.yaml) nor a transformers folder (config.json)"
        )


def _of_transformers(folder: Path, settings: EvalSettings) -> View:
    if settings.topk or settings.selectors != ["own"] or settings.impl or settings.step is not None:
        raise ConfigError(
            f"{folder} is a transformers folder: selectors, topk, impl and step are of runs; attention=NAME "
            "chooses its attention"
        )
    from phsa_megatron.evaluation.tasks.transformers_answerer import TransformersAnswerer

    answerer = TransformersAnswerer(folder, attention=settings.attention, max_tokens=settings.max_tokens)
    return View(answerer, str(folder), None, settings.attention, None, None, None)


@contextmanager
def _of_run(folder: Path, settings: EvalSettings) -> Iterator[list[View]]:
    from phsa_megatron.evaluation.tasks.checkpoint_answerer import DENSE, open_run

    if settings.attention != "sdpa":
        raise ConfigError(f"attention={settings.attention} is of transformers folders, and {folder} is a run")
    with open_run(folder, settings.step, settings.impl) as run:
        views: dict[Any, View] = {}
        for selector in settings.selectors:
            ks: Sequence[int | None] = settings.topk or [None]
            for topk in ks:
                answerer = run.answerer(selector, topk, settings.max_tokens)
                view = View(
                    answerer,
                    str(folder),
                    run.step,
                    answerer.selector,
                    answerer.train_topk,
                    answerer.topk,
                    None if answerer.selector == DENSE else answerer.attention,
                    answerer.without_cache,
                )
                # Where nothing is selected k means nothing: one view for all.
                views.setdefault((view.selector, view.infer_topk), view)
        yield list(views.values())
