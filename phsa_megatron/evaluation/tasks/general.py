"""The general tasks that the paper names, through lm-eval, from a local folder.

DATA_DIR holds one folder for each dataset, by its name on the hub, as a download of the dataset repository
leaves it: DATA_DIR/allenai/ai2_arc/ARC-Challenge/*.parquet. Of the paper's 15 tasks 14 are known by name;
MQZ, which a summary of it mentions, is known to lm-eval under no such name. Which languages of XStoryCloze
and which form of BBH it took is not known: Chinese and three worked examples are this project's choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from phsa_megatron.config.errors import ConfigError
from phsa_megatron.evaluation.tasks.answerer import Answerer
from phsa_megatron.evaluation.tasks.missing import check_files

_Z = 1.959963984540054


class General(NamedTuple):
    """A task of the paper.

    Attributes:
        task: its name in lm-eval.
        dataset: of the hub, which is also its folder in DATA_DIR.
        runs_code: answers are programs, which lm-eval runs.
    """

    task: str
    dataset: str
    runs_code: bool = False


GENERAL_TASKS: dict[str, General] = {
    "gsm8k": General("gsm8k", "openai/gsm8k"),
    "math": General("hendrycks_math", "EleutherAI/hendrycks_math"),
    "mathqa": General("mathqa", "regisss/math_qa"),
    "mmlu": General("mmlu", "cais/mmlu"),
    "cmmlu": General("cmmlu", "haonan-li/cmmlu"),
    "hellaswag": General("hellaswag", "Rowan/hellaswag"),
    "humaneval": General("humaneval", "openai/openai_humaneval", runs_code=True),
    "bbh": General("bbh_cot_fewshot", "SaylorTwift/bbh"),
    "lambada": General("lambada_openai", "EleutherAI/lambada_openai"),
    "xstorycloze": General("xstorycloze_zh", "juletxara/xstory_cloze"),
    "ceval": General("ceval-valid", "ceval/ceval-exam"),
    "piqa": General("piqa", "baber/piqa"),
    "arc_c": General("arc_challenge", "allenai/ai2_arc"),
    "arc_c_zh": General("arc_zh", "alexandrainst/m_arc"),
}
"""By the paper's name."""


class Found(NamedTuple):
    """A value that lm-eval reports."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int | None


def check_data(data_dir: Path | None, names: Sequence[str]) -> None:
    """Refuse to start without the folders of these tasks.

    Raises:
        DataError: one is missing.
    """
    datasets = list(dict.fromkeys(GENERAL_TASKS[name].dataset for name in names))
    check_files(
        data_dir, datasets, "the dataset repositories of the same names on the Hugging Face hub", "data_dir"
    )


def run(
    answerer: Answerer,
    names: Sequence[str],
    data_dir: Path,
    *,
    limit: int | None,
    seed: int,
    allow_code: bool,
    include_dir: Path | None = None,
) -> list[Found]:
    """Return what lm-eval finds for these tasks.

    Args:
        answerer: asked.
        names: keys of GENERAL_TASKS, or names of tasks in `include_dir`.
        data_dir: has a folder for each dataset.
        limit: most samples of each task.
        seed: of few-shot examples and bootstraps.
        allow_code: lm-eval may run programs that the model writes.
        include_dir: lm-eval task files of your own.

    Raises:
        PhsaError: lm-eval or a dataset is missing, or code must run and may not.
    """
    check_data(data_dir, [name for name in names if name in GENERAL_TASKS])
    for name in names:
        if name in GENERAL_TASKS and GENERAL_TASKS[name].runs_code and not allow_code:
            raise ConfigError(
                f"tasks: {name} runs programs that the model writes here; allow_code=true says yes"
            )
    include = str(include_dir.absolute()) if include_dir else None
    with _inside(data_dir):
        # Imported here: the hub's package looks at the environment when it is imported.
        from phsa_megatron.evaluation.tasks.lm_eval_model import PhsaLM, lm_eval_package

        lm_eval = lm_eval_package()
        from lm_eval.tasks import TaskManager

        results = lm_eval.simple_evaluate(
            model=PhsaLM(answerer=answerer),
            tasks=[GENERAL_TASKS[name].task if name in GENERAL_TASKS else name for name in names],
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=allow_code,
            task_manager=TaskManager(include_path=include),
        )
    return list(_found(results))


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder and without a network: a dataset's name is then the folder of that name."""
    before, offline = Path.cwd(), {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    saved = {name: os.environ.get(name) for name in offline}
    os.chdir(folder)
    os.environ.update(offline)
    try:
        yield
    finally:
        os.chdir(before)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _found(results: dict[str, Any]) -> Iterator[Found]:
    for task, values in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            error = float(stderr) if isinstance(stderr, int | float) else None
            yield Found(task, name, float(value), error, samples)


def interval(found: Found) -> tuple[float, float] | None:
    """Return the 95% interval by lm-eval's standard error, or None where it gives none."""
    if found.stderr is None:
        return None
    return found.value - _Z * found.stderr, found.value + _Z * found.stderr
