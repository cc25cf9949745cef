"""What `phsa-eval` is asked to do: KEY=VALUE arguments, each used or refused."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.keys import did_you_mean
from phsa_megatron.config.schema import KernelImpl, Selector
from phsa_megatron.evaluation.tasks.general import GENERAL_TASKS
from phsa_megatron.evaluation.tasks.long_context import LONG_TASKS
from phsa_megatron.evaluation.tasks.longbench import DATASETS

PERPLEXITY = "perplexity"
TASK_GROUPS: dict[str, tuple[str, ...]] = {
    "long": LONG_TASKS,
    "longbench": tuple(DATASETS),
    "general": tuple(GENERAL_TASKS),
}
"""Names for several tasks."""
ALL_TASKS = (*LONG_TASKS, PERPLEXITY, *DATASETS, *GENERAL_TASKS)


@dataclass
class EvalSettings:
    """Settings of one evaluation."""

    tasks: list[str] = field(default_factory=lambda: ["long"])
    """Tasks or groups: long, longbench, general, perplexity, or single ones by name."""
    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096])
    """Tokens of prompt and answer together in the long tasks; the last one is where perplexity ends."""
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Places of the needle as shares of the text, 0 to 1."""
    trials: int = 20
    """Samples for each length, depth (where the task has one) and seed."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Of the samples, and of lm-eval; each seed adds its own samples."""
    selectors: list[str] = field(default_factory=lambda: ["own"])
    """Ways to attend with the same weights: own, dense, or a selector's name."""
    topk: list[int] = field(default_factory=list)
    """Selected blocks per query; empty takes each run's own."""
    step: int | None = None
    """Step of the checkpoint; null is the newest."""
    impl: KernelImpl | None = None
    """Implementation of the attention's ops; null is the run's own."""
    attention: str = "sdpa"
    """Attention of a transformers folder, by transformers' name."""
    max_tokens: int | None = None
    """Most tokens of a text; null is what the model was trained with."""
    haystack: str | None = None
    """Text file to hide needles in; null makes sentences."""
    longbench_dir: str | None = None
    """Folder with LongBench's NAME.jsonl."""
    longbench_prompts: str | None = None
    """JSON file of prompts by data set; null uses this project's wording."""
    texts_dir: str | None = None
    """Folder with the texts of perplexity: *.txt, *.jsonl."""
    data_dir: str | None = None
    """Folder with the datasets of the general tasks, by their names on the hub."""
    include_dir: str | None = None
    """Folder with lm-eval task files of your own, whose names `tasks` may then have."""
    limit: int | None = None
    """Most samples of each LongBench data set, general task, and texts of perplexity; null takes all."""
    allow_code: bool = False
    """Let lm-eval run programs that the model writes (humaneval)."""

    @property
    def chosen(self) -> list[str]:
        """Return the single tasks, each once."""
        return list(dict.fromkeys(name for task in self.tasks for name in TASK_GROUPS.get(task, (task,))))


def parse(arguments: list[str]) -> EvalSettings:
    """Return the settings of KEY=VALUE arguments.

    Raises:
        ConfigError: an unknown key or task, a value of the wrong type or out of its range.
    """
    known = [f.name for f in fields(EvalSettings)]
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in known:
            raise ConfigError(
                f"unknown setting '{key}'.{did_you_mean(key, known)} Settings: {', '.join(known)}"
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(EvalSettings), OmegaConf.from_dotlist(arguments))
        settings: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = error.full_key or ", ".join(arguments)
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    _check(settings)
    return settings  # type: ignore[no-any-return]  # OmegaConf returns the dataclass


def _check(settings: EvalSettings) -> None:
    own_names = [*ALL_TASKS, *TASK_GROUPS]
    for task in settings.tasks:
        if task not in own_names and settings.include_dir is None:
            raise ConfigError(
                f"tasks: no task '{task}'.{did_you_mean(task, own_names)} "
                f"phsa-eval --list names all; tasks of your own need include_dir=FOLDER"
            )
    selectors = ["own", "dense", *(s.value for s in Selector)]
    for name in settings.selectors:
        if name not in selectors:
            raise ConfigError(f"selectors: no selector '{name}'.{did_you_mean(name, selectors)}")
    positive = {"lengths": settings.lengths, "topk": settings.topk, "trials": [settings.trials]}
    if settings.limit is not None:
        positive["limit"] = [settings.limit]
    for key, values in positive.items():
        if any(value < 1 for value in values):
            raise ConfigError(f"{key}={values}: each must be at least 1")
    if any(not 0 <= depth <= 1 for depth in settings.depths):
        raise ConfigError(f"depths={settings.depths}: each is a share of the text, 0 to 1")
    for key in ("tasks", "lengths", "depths", "seeds", "selectors"):
        values = getattr(settings, key)
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{key}={values}: at least one, and each at most once")


def describe() -> str:
    """Return one line for each setting: name, default, meaning; read from the class above."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(EvalSettings)).body[0]
    assert isinstance(body, ast.ClassDef)
    defaults = EvalSettings()
    lines = []
    for node, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(text, ast.Expr)
            and isinstance(node.target, ast.Name)
        ):
            value = getattr(defaults, node.target.id)
            meaning = ast.literal_eval(text.value)
            lines.append(f"  {node.target.id + '=' + _shown(value):<34} {meaning}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
