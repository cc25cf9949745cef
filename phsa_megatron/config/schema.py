"""The typed schema of a run: every setting with its unit, and a docstring under it that `explain` prints.

Values that follow from other values are not here: they are computed once, in `derive.py`. Rules between
fields are not here either: they are checked once, in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from phsa_megatron.config.cluster_schema import ClusterConfig as ClusterConfig
from phsa_megatron.config.cluster_schema import Device as Device
from phsa_megatron.config.cluster_schema import Scheduler as Scheduler


class AttentionKind(StrEnum):
    """What a layer's core attention computes."""

    phsa = "phsa"
    dense = "dense"


class KernelImpl(StrEnum):
    """Which implementation of the ops runs; it is used or refused, never swapped."""

    reference = "reference"
    triton = "triton"


class GroupScore(StrEnum):
    """How the scores of the query heads of one key-value group become one score (method, section 3)."""

    softmax_sum = "softmax_sum"
    raw_sum = "raw_sum"


class PunctuationMatch(StrEnum):
    """Which decoded tokens count as punctuation (method, section 1)."""

    exact = "exact"
    exact_any = "exact_any"
    strip_any = "strip_any"


class PunctuationLanguage(StrEnum):
    """Whose punctuation marks are in the set."""

    en = "en"
    en_zh = "en_zh"


class Dtype(StrEnum):
    """The dtype of weights and activations; master weights and gradient sums are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class LrSchedule(StrEnum):
    """Shape of the learning-rate curve after warm-up."""

    wsd = "wsd"
    cosine = "cosine"


class Recompute(StrEnum):
    """Activation recomputation: none, the core attention only, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class WandbMode(StrEnum):
    """Where W&B writes."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class RunConfig:
    """What the run is called, how long it is and where it starts."""

    name: str = MISSING
    """Fixed name of the run; the run folder is `root_dir/name`. Never a timestamp."""
    root_dir: str = "runs"
    """Folder that holds all run folders."""
    seed: int = 1234
    """Seed of weight initialization and of the data order."""
    train_steps: int = MISSING
    """Optimizer steps in the whole run."""
    dtype: Dtype = Dtype.bf16
    """Dtype of weights and activations."""
    num_threads: int = 0
    """CPU threads for torch; 0 leaves torch's own choice."""
    init_from: str | None = None
    """Run folder or Hugging Face folder whose weights start this run: a new stage with a new data order."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts continued by the model at the end, shown in the report."""
    sample_num_tokens: int = 48
    """Tokens generated per prompt."""


@dataclass
class ModelConfig:
    """Shape of a Qwen3-like decoder: RoPE, GQA, SwiGLU, RMSNorm, no biases."""

    name: str = MISSING
    """Name of the shape, for people."""
    num_layers: int = MISSING
    """Transformer layers."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU inner layer."""
    num_query_heads: int = MISSING
    """Query heads."""
    num_kv_heads: int = MISSING
    """Key-value heads; query heads divide evenly among them."""
    head_dim: int = MISSING
    """Width of one head."""
    vocab_size: int = MISSING
    """Rows of the embedding before padding; at least the tokenizer's size."""
    vocab_pad_multiple: int = 128
    """The embedding is padded to a multiple of this times the tensor-parallel size."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before RoPE."""
    rope_base: float = 1_000_000.0
    """RoPE theta."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of weight initialization."""
    mtp_num_layers: int = 0
    """Multi-token-prediction depths after the main stack; 0 is none."""


@dataclass
class AttentionConfig:
    """The attention of every layer. The method page numbers are in brackets."""

    kind: AttentionKind = AttentionKind.phsa
    """phsa or dense."""
    impl: KernelImpl = KernelImpl.reference
    """Implementation of the PHSA ops; used or refused, never swapped."""
    block_tokens: int = 16
    """Keys per block (m) [1]."""
    init_tokens: int = 16
    """Tokens at the start of the document that every query attends to; a multiple of block_tokens [3]."""
    local_tokens: int = 128
    """Local window: the current block and the blocks before it; a multiple of block_tokens [3]."""
    train_topk: int = 2
    """Selected blocks per query token and key-value head in training (k) [3, 4]."""
    infer_topk: int | None = None
    """Selected blocks in evaluation and generation; null uses train_topk [4]."""
    mean_weight_frac: float = 0.5
    """lambda: weight of the plain block mean against the punctuation mean; 1 is plain mean pooling [2]."""
    group_score: GroupScore = GroupScore.softmax_sum
    """How a group's heads share one selection [3]."""
    punctuation_match: PunctuationMatch = PunctuationMatch.exact
    """Which decoded tokens count as punctuation [1]."""
    punctuation_language: PunctuationLanguage = PunctuationLanguage.en
    """English marks only, or English and Chinese [1]."""
    dense_len_tokens: int = 0
    """Documents of up to this many tokens get full causal attention; 0 never [4]."""


@dataclass
class SourceConfig:
    """One data source: a prepared indexed dataset, its share of the mixture and its domain."""

    weight: float = MISSING
    """Share of the training sequences, relative to the other sources."""
    domain: str = MISSING
    """Validation loss is reported per domain."""
    train_prefix: str = MISSING
    """Path of the prepared training set without its .bin, .idx or .json ending."""
    valid_prefix: str | None = None
    """Path of the prepared validation set; null if this source is not validated on."""


@dataclass
class DataConfig:
    """Text: tokenizer, sources, and how documents become sequences."""

    name: str = MISSING
    """Name of the mixture, for people."""
    seq_len_tokens: int = MISSING
    """Tokens per training sequence."""
    tokenizer_file: str = MISSING
    """A Hugging Face tokenizer.json."""
    eod_token: str = "<|endoftext|>"
    """Token that ends every document; it must be in the tokenizer."""
    isolate_documents: bool = True
    """Attention, blocks and positions never cross a document; false treats a sequence as one document."""
    max_documents_per_sequence: int | None = None
    """Fixed length of the boundary tensor; null derives seq_len_tokens / 16. Tokens of further documents
    in a sequence become padding without loss, and are counted."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """The mixture, by source name."""


@dataclass
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_size: int = 1
    """Tensor-parallel processes (TP)."""
    pipeline_size: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_size: int | None = None
    """Model chunks per pipeline stage (VPP); null is off."""
    context_size: int = 1
    """Context-parallel processes (CP)."""
    sequence_parallel: bool = False
    """Shard norms and residuals along the sequence inside a tensor-parallel group."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass; needs the distributed optimizer."""
    recompute: Recompute = Recompute.none
    """Activation recomputation."""


@dataclass
class OptimConfig:
    """AdamW, its schedule and the batch."""

    global_batch_sequences: int = MISSING
    """Sequences per optimizer step over all processes."""
    micro_batch_sequences: int = MISSING
    """Sequences per forward pass of one process."""
    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: LrSchedule = LrSchedule.wsd
    """wsd: warm up, stay, decay; cosine: warm up, then half a cosine down to the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    decay_steps: int = 0
    """Last steps in which wsd decays linearly to min_lr; cosine ignores it and must leave it 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled to at most this global L2 norm; 0 is off."""


@dataclass
class CheckpointConfig:
    """Saving and keeping."""

    save_every_steps: int = 1000
    """Steps between saves; 0 saves only when asked and at the end."""
    keep_last: int = 2
    """Committed checkpoints kept; the last committed one is never removed."""
    async_save: bool = False
    """Write in the background while training goes on."""


@dataclass
class EvaluateConfig:
    """Validation loss per domain."""

    every_steps: int = 0
    """Steps between evaluations; 0 evaluates only at the end."""
    num_sequences_per_domain: int = 64
    """Validation sequences per domain, always the same ones."""
    micro_batch_sequences: int = 1
    """Sequences per forward pass of one process in evaluation."""


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.offline
    """offline writes into the run folder and prints the sync command; online uploads; disabled is off."""
    project: str = "phsa-megatron"
    """Project name."""
    entity: str | None = None
    """Team or user; null is the account's default."""


@dataclass
class MonitoringConfig:
    """What is measured and where it is written."""

    log_every_steps: int = 1
    """Steps between metric records."""
    progress: bool = True
    """Progress bar on a terminal; without a terminal, plain lines."""
    report: bool = True
    """Write report.html when the run ends or stops."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""


@dataclass
class TrainConfig:
    """The whole of a run. The resolved file in the run folder has exactly these keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
