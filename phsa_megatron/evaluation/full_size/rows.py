"""What is measured, in which order, with which settings, and what the rows must show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phsa_megatron.config.compose import compose
from phsa_megatron.config.derive import derive
from phsa_megatron.config.schema import Recompute, TrainConfig
from phsa_megatron.config.validate import validate

TOKENS_PER_STEP = 131072
"""Tokens of a step in every row, so that an optimizer step weighs the same in all of them."""
PEAK_TFLOPS = 989.0
RESERVE_GIB = 7.0
"""Left free where a setting is chosen by estimated memory: CUDA's context, cuBLAS, fragmentation."""


@dataclass(frozen=True)
class Setting:
    """One way to fit a row into memory.

    Attributes:
        recompute: what is computed again.
        recompute_layers: of full recomputation, the first so many layers; None is all.
        micro_batch: sequences of a forward pass.
    """

    recompute: Recompute = Recompute.none
    recompute_layers: int | None = None
    micro_batch: int = 1

    @property
    def text(self) -> str:
        """Return the recomputation in short."""
        layers = "" if self.recompute_layers is None else f" of {self.recompute_layers} layers"
        return f"{self.recompute.value}{layers}"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        attention: phsa or dense.
        seq_len_tokens: tokens of a sequence.
        topk: selected blocks a query; None for dense.
        packed: documents stay apart inside a sequence; otherwise texts are joined to one document.
        num_timed: steps that are timed.
        num_warm_up: steps before them.
    """

    attention: str
    seq_len_tokens: int
    topk: int | None = None
    packed: bool = False
    num_timed: int = 5
    num_warm_up: int = 2

    @property
    def name(self) -> str:
        """Return a name for people and for `--only`: phsa_k2_32k, dense_128k, phsa_k2_4k_packed."""
        kind = "dense" if self.topk is None else f"phsa_k{self.topk}"
        return f"{kind}_{self.seq_len_tokens // 1024}k" + ("_packed" if self.packed else "")


# The most telling first: whoever stops early has those.
ROWS = (
    Row("phsa", 32768, 2),
    Row("dense", 32768),
    Row("dense", 4096, num_timed=8),
    Row("phsa", 4096, 2, num_timed=8),
    Row("phsa", 131072, 2, num_warm_up=1),
    Row("dense", 131072, num_warm_up=1),
    Row("phsa", 32768, 16),
    Row("phsa", 131072, 16, num_warm_up=1),
    Row("phsa", 4096, 16),
    Row("phsa", 32768, 2, packed=True),
    Row("dense", 32768, packed=True),
    Row("phsa", 4096, 2, packed=True),
    Row("dense", 4096, packed=True),
)


def recipe_of(row: Row) -> str:
    """Return the recipe that a row runs; there is none of 128k, which takes the settings of 32k."""
    length = "4k" if row.seq_len_tokens <= 4096 else "32k"
    return f"{row.attention}_0p6b_pretrain_8gpu_h100_bf16_{length}"


def overrides_of(row: Row, setting: Setting, extra: tuple[str, ...] = ()) -> list[str]:
    """Return the settings of a row beyond its recipe."""
    topk = [] if row.topk is None else [f"attention.train_topk={row.topk}"]
    layers = "null" if setting.recompute_layers is None else setting.recompute_layers
    settings = [
        "data=demo_qwen3",
        f"data.seq_len_tokens={row.seq_len_tokens}",
        f"data.isolate_documents={str(row.packed).lower()}",
        "cluster=local_gpu",
        "parallel=single",
        f"parallel.recompute={setting.recompute.value}",
        f"parallel.recompute_layers={layers}",
        "compute.loss=chunked",
        "compute.elementwise=compiled",
        "compute.norm=triton",
        f"optim.global_batch_sequences={max(1, TOKENS_PER_STEP // row.seq_len_tokens)}",
        f"optim.micro_batch_sequences={setting.micro_batch}",
        "evaluate.every_steps=0",
        "monitoring.wandb.mode=disabled",
        "monitoring.log_every_steps=10",
        *topk,
    ]
    return [*without(settings, extra), *extra]


def without(settings: list[str], others: tuple[str, ...]) -> list[str]:
    """Return the settings KEY=VALUE whose key is not among those of `others`."""
    given = {text.split("=", 1)[0] for text in others}
    return [text for text in settings if text.split("=", 1)[0] not in given]


def config_of(row: Row, setting: Setting, extra: tuple[str, ...] = ()) -> TrainConfig:
    """Return the resolved settings of a row, with all rules checked.

    Raises:
        ConfigError: a rule is broken, `extra` among what may break it.
    """
    config = compose([f"recipe={recipe_of(row)}", *overrides_of(row, setting, extra)]).config
    validate(config)
    return config


def settings_to_try(row: Row, memory_gib: float, extra: tuple[str, ...] = ()) -> list[Setting]:
    """Return the settings of a row, the fastest that should fit first, then what fits if it does not.

    Without recomputation nothing is computed twice, so what fits without it is the best setting. Otherwise as
    few layers as the estimate allows are recomputed, and more if that does not fit.
    """
    most = max(1, 32768 // row.seq_len_tokens)
    for micro_batch in (most,) if most == 1 else (most, most // 2):
        plain = Setting(micro_batch=micro_batch)
        if _estimate_gib(row, plain, extra) <= memory_gib - RESERVE_GIB:
            half = [] if micro_batch == 1 else [Setting(micro_batch=micro_batch // 2)]
            return [plain, *half, Setting(Recompute.mlp, None, 1), Setting(Recompute.full, None, 1)]
    layers = config_of(row, Setting(), extra).model.num_layers
    few = next(
        (
            number
            for number in range(1, layers)
            if _estimate_gib(row, Setting(Recompute.full, number, 1), extra) <= memory_gib - RESERVE_GIB
        ),
        layers,
    )
    numbers = sorted({few, min(layers, few + 3), layers})
    return [Setting(Recompute.full, None if n == layers else n, 1) for n in numbers]


def _estimate_gib(row: Row, setting: Setting, extra: tuple[str, ...]) -> float:
    return derive(config_of(row, setting, extra)).memory.total_gib


@dataclass(frozen=True)
class Gate:
    """What two rows must show together.

    Attributes:
        name: for people.
        least: the smallest value that passes.
        goal: where the work is going.
        value: what was measured, None while a row is missing.
    """

    name: str
    least: float
    goal: float
    value: float | None

    @property
    def verdict(self) -> str:
        """Return passed, failed or not measured."""
        if self.value is None:
            return "not measured"
        return "passed" if self.value >= self.least else "failed"


def gates(results: list[dict[str, Any]]) -> list[Gate]:
    """Return the gates of the full-size run over the rows measured so far."""
    speed = {r["name"]: r["tokens_per_s"] for r in results if r.get("tokens_per_s")}
    utilization = {r["name"]: r["mfu_selected_frac"] for r in results if r.get("tokens_per_s")}

    def ratio(length: str) -> float | None:
        phsa, dense = speed.get(f"phsa_k2_{length}"), speed.get(f"dense_{length}")
        return phsa / dense if phsa and dense else None

    return [
        Gate("tokens/s at 32k, k = 2, against dense", 2.2, 2.7, ratio("32k")),
        Gate("tokens/s at 128k, k = 2, against dense", 5.5, 7.5, ratio("128k")),
        Gate("tokens/s at 4k, k = 2, against dense", 0.95, 1.0, ratio("4k")),
        Gate("MFU of dense at 4k", 0.40, 0.50, utilization.get("dense_4k")),
    ]
