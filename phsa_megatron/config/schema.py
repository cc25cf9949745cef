"""The typed schema of a run: every setting with its unit, and a docstring under it that `explain` prints.

Values that follow from other values are not here: they are computed once, in `derive.py`. Rules between
fields are not here either: they are checked once, in `validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from phsa_megatron.config.schema_attention import AttentionConfig as AttentionConfig
from phsa_megatron.config.schema_attention import AttentionKind as AttentionKind
from phsa_megatron.config.schema_attention import GroupScore as GroupScore
from phsa_megatron.config.schema_attention import KernelImpl as KernelImpl
from phsa_megatron.config.schema_attention import PunctuationLanguage as PunctuationLanguage
from phsa_megatron.config.schema_attention import PunctuationMatch as PunctuationMatch
from phsa_megatron.config.schema_attention import Selector as Selector
from phsa_megatron.config.schema_attention import TopkSchedule as TopkSchedule
from phsa_megatron.config.schema_cluster import ClusterConfig as ClusterConfig
from phsa_megatron.config.schema_cluster import Device as Device
from phsa_megatron.config.schema_cluster import Scheduler as Scheduler
from phsa_megatron.config.schema_compute import Adam as Adam
from phsa_megatron.config.schema_compute import ComputeConfig as ComputeConfig
from phsa_megatron.config.schema_compute import CudaGraphs as CudaGraphs
from phsa_megatron.config.schema_compute import Elementwise as Elementwise
from phsa_megatron.config.schema_compute import Fp8 as Fp8
from phsa_megatron.config.schema_compute import Layers as Layers
from phsa_megatron.config.schema_compute import Loss as Loss
from phsa_megatron.config.schema_compute import Norm as Norm
from phsa_megatron.config.schema_health import HealthConfig
from phsa_megatron.config.schema_monitoring import AlertsConfig as AlertsConfig
from phsa_megatron.config.schema_monitoring import MonitoringConfig as MonitoringConfig
from phsa_megatron.config.schema_monitoring import ProfileConfig as ProfileConfig
from phsa_megatron.config.schema_monitoring import WandbConfig as WandbConfig
from phsa_megatron.config.schema_monitoring import WandbMode as WandbMode


class Dtype(StrEnum):
    """The dtype of weights and activations; master weights and gradient sums are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class LrSchedule(StrEnum):
    """Shape of the learning-rate curve after warm-up."""

    wsd = "wsd"
    cosine = "cosine"


class Recompute(StrEnum):
    """Activation recomputation: none, the core attention only, the MLP only, or whole layers."""

    none = "none"
    selective = "selective"
    mlp = "mlp"
    full = "full"


class ContextExchange(StrEnum):
    """Which keys and values context-parallel processes send to each other."""

    all_gather = "all_gather"
    block_sparse = "block_sparse"
    auto = "auto"


class ContextSharding(StrEnum):
    """Which parts of a sequence a context-parallel process holds."""

    zigzag = "zigzag"
    contiguous = "contiguous"


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
    """Width of the SwiGLU inner layer; of each expert, if there are any."""
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
    num_experts: int = 0
    """Experts in the MLP of every layer; each token uses expert_topk of them; 0 is one MLP for all."""
    expert_topk: int = 2
    """Experts per token, weighted by softmax over the chosen ones, so at least 2; unused without experts."""
    expert_balance_coeff: float = 0.0
    """Weight of the auxiliary loss that balances experts, over the tokens of a micro-batch; 0 is off."""
    mtp_num_layers: int = 0
    """Multi-token-prediction depths after the main stack; 0 is none."""


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
    skip_sequences: list[str] = field(default_factory=list)
    """Training sequences to pass over, by number or FIRST-LAST, such as those of a loss spike; what is
    trained on already cannot be passed over."""
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
    context_exchange: ContextExchange = ContextExchange.all_gather
    """all_gather: all keys and values, sent while blocks are selected; block_sparse: the blocks that the
    receiver's queries attend to, after selection, for which the host waits for the device in every layer;
    auto: in each layer and micro-batch what is fewer bytes."""
    context_sharding: ContextSharding = ContextSharding.zigzag
    """zigzag: one chunk from each end of a sequence, so that all processes score as many blocks; contiguous:
    one piece, so that windows and documents lie on fewer processes."""
    context_node_size: int | None = None
    """Context-parallel processes on one node: keys cross to each other node once, then spread inside it;
    null sends to all processes alike."""
    expert_size: int = 1
    """Processes that share the experts (EP), each expert whole: among all those of a pipeline stage."""
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
    recompute_layers: int | None = None
    """With recompute=full, how many layers of a model chunk are recomputed, from the first on, while the
    others keep everything; null is all of them."""


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
    local_copy_dir: str | None = None
    """Folder on each node's own disk for a copy of the newest committed checkpoint, read at a restart
    instead of the shared folder if it is the same one; null keeps no copy."""


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
class TrainConfig:
    """The whole of a run. The resolved file in the run folder has exactly these keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
