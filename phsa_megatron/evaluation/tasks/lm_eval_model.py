"""`phsa-eval lm-eval ...`: lm-eval with the model `phsa`, which is a checkpoint of this project.

  phsa-eval lm-eval --model phsa --model_args run=runs/mine --tasks arc_easy
  phsa-eval lm-eval --model phsa --model_args run=runs/mine,topk=4,selector=mean_pool --tasks arc_easy

All arguments are lm_eval's own. lm-eval looks for no models in other packages, so that the command `lm_eval`
knows `phsa` only after this module is imported: this command does that, and so can a script.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.answerer import Answerer, Request


def lm_eval_package() -> ModuleType:
    """Return lm_eval.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ConfigError(
            "general tasks need the package 'lm_eval', which is not installed here; "
            "install phsa-megatron[eval]"
        ) from error


lm_eval_package()

from lm_eval import utils  # noqa: E402  # after the check that names the extra
from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_DEFAULT_ROOM = 256
_REQUESTS_AT_ONCE = 64
_LM_EVAL_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "batch_size": (None, 1, "1", "auto"),
    "max_batch_size": (None,),
    "device": (None, "cuda:0"),
}


@register_model("phsa")
class PhsaLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """A checkpoint of this project, or any answerer, in lm-eval's terms."""

    def __init__(
        self,
        run: str | None = None,
        step: int | None = None,
        selector: str = "own",
        topk: int | None = None,
        max_tokens: int | None = None,
        answerer: Answerer | None = None,
        **lm_eval_settings: Any,
    ) -> None:
        """Open a run; `--model_args run=RUN,step=...` sets these by name.

        Args:
            run: a run folder.
            step: of the checkpoint; None is the newest.
            selector: own, dense, or a selector's name.
            topk: selected blocks per query; None is the run's own.
            max_tokens: most tokens of a text; None is the training length.
            answerer: asked instead of a run.
            lm_eval_settings: batch_size, max_batch_size and device, which lm_eval always passes; only its
                defaults are taken, because requests are packed up to the training length, and the device is
                the run's.

        Raises:
            PhsaError: the run cannot be opened, or a setting is none of these.
        """
        super().__init__()
        unknown = {
            name: value
            for name, value in lm_eval_settings.items()
            if value not in _LM_EVAL_DEFAULTS.get(name, ())
        }
        if unknown:
            raise ConfigError(
                f"model phsa: {unknown} cannot be used; it has run, step, selector, topk and max_tokens"
            )
        self._open = ExitStack()
        if answerer is None:
            if run is None:
                raise ConfigError("model phsa: --model_args run=RUN is missing, the folder of a run")
            answerer = self._opened(Path(run), step).answerer(selector, topk, max_tokens)
        self.answerer: Answerer = answerer

    def _opened(self, run: Path, step: int | None) -> Any:
        from phsa_megatron.parallel import cpu_shim

        cpu_shim.install()
        from phsa_megatron.evaluation.tasks.checkpoint_answerer import open_run

        return self._open.enter_context(open_run(run, step))

    def close(self) -> None:
        """Take down what was opened here."""
        self._open.close()

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document, and stands for an empty context."""
        return self.answerer.eod_id

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.answerer.max_tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; special ones are never added."""
        return self.answerer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = []
        for _pair, context, continuation in requests:
            # The end of a text that is too long is kept, and what is scored is all of it.
            ids = (context + continuation)[-self.max_length :]
            first = len(ids) - len(continuation)
            if first < 1:
                raise ConfigError(
                    f"{self.answerer.name}: a continuation of {len(continuation):,} tokens does not fit into "
                    f"{self.max_length:,}"
                )
            asked.append(Request(ids, first))
        results: list[tuple[float, bool]] = []
        starts = range(0, len(asked), _REQUESTS_AT_ONCE)
        for start in track(starts, "loglikelihood", console=Console(stderr=True), disable=disable_tqdm):
            for logprobs, is_greedy in self.answerer.score(asked[start : start + _REQUESTS_AT_ONCE]):
                results.append((float(logprobs.double().sum()), bool(is_greedy.all())))
        for (pair, *_rest), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each token after as much context as fits."""
        totals = []
        for (text,) in track(
            [request.args for request in requests],
            "rolling loglikelihood",
            console=Console(stderr=True),
            disable=disable_tqdm,
        ):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                # A window predicts as many tokens as it reads, and both ends are in one text here.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [(("", text), *utils.make_disjoint_window(window)) for window in windows]
            total = sum(nats for nats, _ in self._loglikelihood_tokens(parts, disable_tqdm=True))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the most likely continuations, each up to its first stop text.

        Raises:
            ConfigError: a task asks for sampling, which this model does not do.
        """
        answers = []
        for context, settings in track(
            [request.args for request in requests],
            "generating",
            console=Console(stderr=True),
            disable=disable_tqdm,
        ):
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise ConfigError(f"{self.answerer.name} generates greedily, and a task asks for {settings}")
            until = settings.get("until") or []
            stop: Sequence[str] = [until] if isinstance(until, str) else until
            room = int(settings.get("max_gen_toks", _DEFAULT_ROOM))
            room = min(room, self.max_length - 1)
            ids = self.tok_encode(context)
            if len(ids) + room > self.max_length:
                context = self.answerer.decode(ids[len(ids) + room - self.max_length :])
            answer = self.answerer.generate([context], room, list(stop))[0]
            answers.append(answer)
            self.cache_hook.add_partial("generate_until", (context, settings), answer)
        return answers


def main(argv: list[str]) -> int:
    """Run lm_eval's own command line in this process, with the model phsa known to it."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
