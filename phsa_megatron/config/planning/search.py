"""All layouts of a run on its cluster: those that the rules allow, measured by memory and by time.

A layout is refused by the rules of `validate.py` alone. Two bounds keep the search short and are stated in
the report: tensor-parallel groups stay on one host, and a micro-batch holds at most `MOST_TOKENS` of a
process's tokens beyond one sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from phsa_megatron.config import flops
from phsa_megatron.config.derive import data_parallel_size, micro_batches_per_step, world_size
from phsa_megatron.config.errors import ConfigError
from phsa_megatron.config.memory import MemoryEstimate, estimate_memory
from phsa_megatron.config.planning.communication import Communication, communication
from phsa_megatron.config.planning.machine import Machine
from phsa_megatron.config.planning.step_time import StepTime, step_time
from phsa_megatron.config.schema import Recompute, TrainConfig
from phsa_megatron.config.selector_kinds import learned_selector
from phsa_megatron.config.validate import RULES, validate

MOST_TOKENS = 32768
"""Micro-batches of several sequences hold at most this many tokens of a process: more gains nothing."""


@dataclass(frozen=True)
class Layout:
    """What the search varies."""

    tensor_size: int
    pipeline_size: int
    virtual_pipeline_size: int | None
    context_size: int
    micro_batch_sequences: int
    recompute: Recompute

    @classmethod
    def of(cls, config: TrainConfig) -> Layout:
        """Return the layout of a run."""
        parallel = config.parallel
        return cls(
            parallel.tensor_size,
            parallel.pipeline_size,
            parallel.virtual_pipeline_size,
            parallel.context_size,
            config.optim.micro_batch_sequences,
            parallel.recompute,
        )

    def apply(self, config: TrainConfig) -> TrainConfig:
        """Return a run in this layout: sequence parallelism with TP, distributed optimizer and overlap on."""
        parallel = replace(
            config.parallel,
            tensor_size=self.tensor_size,
            pipeline_size=self.pipeline_size,
            virtual_pipeline_size=self.virtual_pipeline_size,
            context_size=self.context_size,
            recompute=self.recompute,
            recompute_layers=None,
            sequence_parallel=self.tensor_size > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        optim = replace(config.optim, micro_batch_sequences=self.micro_batch_sequences)
        return replace(config, parallel=parallel, optim=optim)

    def settings(self) -> list[str]:
        """Return the layout as arguments for the command line."""
        virtual = "null" if self.virtual_pipeline_size is None else self.virtual_pipeline_size
        return [
            f"parallel.tensor_size={self.tensor_size}",
            f"parallel.sequence_parallel={str(self.tensor_size > 1).lower()}",
            f"parallel.pipeline_size={self.pipeline_size}",
            f"parallel.virtual_pipeline_size={virtual}",
            f"parallel.context_size={self.context_size}",
            f"parallel.recompute={self.recompute.value}",
            "parallel.recompute_layers=null",
            "parallel.distributed_optimizer=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
            f"optim.micro_batch_sequences={self.micro_batch_sequences}",
        ]


@dataclass(frozen=True)
class Estimate:
    """A layout with what it takes.

    Attributes:
        layout: the layout.
        data_size: model copies (DP).
        micro_batches: of a step.
        memory: of the fullest GPU.
        sent: by one GPU in a step.
        time: of a step.
        tokens_per_s: over all GPUs.
        utilization_frac: of the peak, in the run's own FLOPs (selection included, recomputation left out).
        over_gib: memory beyond what a GPU has, the reserve left free; negative is room.
    """

    layout: Layout
    data_size: int
    micro_batches: int
    memory: MemoryEstimate
    sent: Communication
    time: StepTime
    tokens_per_s: float
    utilization_frac: float
    over_gib: float

    @property
    def fits(self) -> bool:
        """Return whether a GPU holds it."""
        return self.over_gib <= 0

    def usd_per_million_tokens(self, config: TrainConfig, gpu_hour_usd: float) -> float:
        """Return the price of a million tokens."""
        return world_size(config) * gpu_hour_usd / 3600 / self.tokens_per_s * 1e6


@dataclass(frozen=True)
class Plan:
    """All layouts of a run.

    Attributes:
        config: the run, as written.
        machine: what it runs on.
        as_written: the estimate of its own layout, settings of optimizer and overlap included; None if it
            breaks a rule.
        broken_rules: the message of the rules that the run breaks as written, or nothing.
        fitting: layouts that fit, the fastest first.
        too_big: layouts that do not fit, the fastest first.
        refused: how many layouts each setting's rule refused, and one message of each.
    """

    config: TrainConfig
    machine: Machine
    as_written: Estimate | None
    broken_rules: str
    fitting: list[Estimate]
    too_big: list[Estimate]
    refused: dict[str, tuple[int, str]]

    def best(self, most: int) -> list[Estimate]:
        """Return the fastest that fit, one of each TP, PP and CP."""
        return _one_of_each(self.fitting)[:most]

    def best_too_big(self, most: int) -> list[Estimate]:
        """Return the fastest that do not fit, one of each TP, PP and CP; if nothing fits, the smallest."""
        by_size = sorted(self.too_big, key=lambda estimate: estimate.over_gib)
        return _one_of_each(self.too_big if self.fitting else by_size)[:most]

    def by_layout(self) -> dict[Layout, Estimate]:
        """Return every estimate that the rules allow."""
        return {estimate.layout: estimate for estimate in (*self.fitting, *self.too_big)}


def _one_of_each(estimates: list[Estimate]) -> list[Estimate]:
    seen: dict[tuple[int, int, int], Estimate] = {}
    for estimate in estimates:
        layout = estimate.layout
        seen.setdefault((layout.tensor_size, layout.pipeline_size, layout.context_size), estimate)
    return list(seen.values())


class Estimator:
    """Measures layouts of one run; what does not depend on the layout is computed once."""

    def __init__(self, config: TrainConfig, machine: Machine) -> None:
        """Take the run and its machine; counts FLOPs of a sequence."""
        self.machine = machine
        self._parameters: dict[int, flops.ParameterCount] = {}
        parameters = self._count(config, flops.padded_vocab_size(config.model, 1))
        length = config.data.seq_len_tokens
        self._sequence_flops = flops.train_flops_per_sequence(
            length, config.model, parameters, config.attention
        )

    def estimate(self, config: TrainConfig, document_tokens: float | None = None) -> Estimate:
        """Return what a run takes in its own layout; `document_tokens` as in `attention_time`."""
        padded = flops.padded_vocab_size(config.model, config.parallel.tensor_size)
        parameters = self._count(config, padded)
        data, micro_batches = data_parallel_size(config), micro_batches_per_step(config)
        memory = estimate_memory(config, parameters, padded, data, micro_batches)
        time = step_time(config, self.machine, parameters, padded, document_tokens)
        sequences = config.optim.global_batch_sequences
        peak = world_size(config) * self.machine.peak_tflops * 1e12
        return Estimate(
            layout=Layout.of(config),
            data_size=data,
            micro_batches=micro_batches,
            memory=memory,
            sent=communication(config, parameters, padded),
            time=time,
            tokens_per_s=sequences * config.data.seq_len_tokens / time.step_s,
            utilization_frac=sequences * self._sequence_flops / time.step_s / peak,
            over_gib=memory.total_gib - self.machine.usable_gib,
        )

    def _count(self, config: TrainConfig, padded: int) -> flops.ParameterCount:
        if padded not in self._parameters:
            self._parameters[padded] = flops.count_parameters(config.model, padded, config.attention)
        return self._parameters[padded]


def _refuse_what_is_not_counted(config: TrainConfig) -> None:
    """Raise ConfigError for settings whose activations, bytes or times the plan does not know."""
    if config.model.num_experts:
        raise ConfigError(
            f"model.num_experts={config.model.num_experts}: the plan counts no activations and no time of "
            "experts; set model.num_experts=0 to plan the dense model of this shape"
        )
    attention = config.attention
    learned = learned_selector(attention)
    if learned is not None or attention.align_coeff:
        name = f"selector={learned}" if learned else f"align_coeff={attention.align_coeff:g}"
        raise ConfigError(
            f"attention.{name}: the plan knows no activations and no time of it; plan attention=phsa or dense"
        )
    plain = {"context_exchange": "all_gather", "context_sharding": "zigzag", "context_node_size": None}
    for name, value in plain.items():
        found = getattr(config.parallel, name)
        if found != value:
            raise ConfigError(
                f"parallel.{name}={getattr(found, 'value', found)}: the plan counts the exchange of all keys "
                f"and values between zigzag chunks; set parallel.{name}={'null' if value is None else value}"
            )


def make_plan(config: TrainConfig, machine: Machine) -> Plan:
    """Return all layouts of a run, measured.

    Raises:
        ConfigError: no layout keeps the rules; the message says which rules refuse and how to go on.
    """
    _refuse_what_is_not_counted(config)
    estimator = Estimator(config, machine)
    measured: list[Estimate] = []
    refused: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for layout in layouts(config, machine):
        changed = layout.apply(config)
        message = broken_rule(changed)
        if message is None:
            measured += [
                estimator.estimate(replace(layout, recompute=mode).apply(config)) for mode in Recompute
            ]
        else:
            field = message.split("=", 1)[0]
            refused[field] += 1
            examples.setdefault(field, message)
    if not measured:
        rules = "\n".join(f"  {examples[field]}" for field, _ in refused.most_common())
        raise ConfigError(
            f"no layout of {world_size(config)} processes keeps the rules; change the cluster, the batch or "
            f"the sequence length. Among the rules that refuse:\n{rules}"
        )
    measured.sort(key=lambda estimate: -estimate.tokens_per_s)
    written, broken = None, ""
    try:
        validate(config)
        written = estimator.estimate(config)
    except ConfigError as error:
        broken = str(error)
    return Plan(
        config=config,
        machine=machine,
        as_written=written,
        broken_rules=broken,
        fitting=[estimate for estimate in measured if estimate.fits],
        too_big=[estimate for estimate in measured if not estimate.fits],
        refused={field: (count, examples[field]) for field, count in refused.most_common()},
    )


def broken_rule(config: TrainConfig) -> str | None:
    """Return the first message of the rules between settings, or None."""
    return next((message for rule in RULES for message in rule(config)), None)


def layouts(config: TrainConfig, machine: Machine) -> Iterator[Layout]:
    """Yield the layouts to try, without recomputation: sizes that divide the processes; rules come later."""
    processes = world_size(config)
    for tensor in (size for size in _divisors(processes) if size <= machine.gpus_per_node):
        for pipeline in _divisors(processes // tensor):
            if pipeline > config.model.num_layers:
                continue
            chunks = _divisors(config.model.num_layers // pipeline) if pipeline > 1 else [1]
            for context in _divisors(processes // tensor // pipeline):
                for virtual in chunks:
                    for rows in _micro_batches(config, context):
                        yield Layout(
                            tensor, pipeline, virtual if virtual > 1 else None, context, rows, Recompute.none
                        )


def _micro_batches(config: TrainConfig, context: int) -> list[int]:
    own = config.data.seq_len_tokens // context
    most = max(1, MOST_TOKENS // own) if own else 1
    return [size for size in _divisors(config.optim.global_batch_sequences) if size <= most]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
