"""Settings that break one rule and nothing else, and what the message must say."""

from broken_compute_rules import BROKEN_COMPUTE
from broken_learned_rules import BROKEN_LEARNED

from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    ContextSharding,
    Device,
    GroupScore,
    KernelImpl,
    LrSchedule,
    Scheduler,
    Selector,
    TopkSchedule,
)

SLURM: dict[str, object] = {"cluster.scheduler": Scheduler.slurm}

# rule -> settings that break it and nothing else, and what its message must say: field and value, rule, fix.
SMALL = {"optim.micro_batch_sequences": 1}
BROKEN = [
    *BROKEN_COMPUTE,
    ("_run_name", {"run.name": "a/b"}, ["run.name='a/b'", "names a folder", "choose another"]),
    ("_run_name", {"run.name": ""}, ["run.name=''", "names a folder"]),
    ("_skip_list", {"data.skip_sequences": ["9-3"]}, ["data.skip_sequences", "'9-3'", "FIRST-LAST"]),
    ("_skip_list", {"data.skip_sequences": ["a"]}, ["data.skip_sequences", "'a'", "such as '800-815'"]),
    ("_topk", {"attention.train_topk": 0}, ["attention.train_topk=0", "attention.kind=dense"]),
    ("_topk", {"attention.infer_topk": 0}, ["attention.infer_topk=0", "at least one block"]),
    *BROKEN_LEARNED,
    ("_heads_divide", {"model.num_query_heads": 7}, ["num_query_heads=7", "num_kv_heads=2", "use 6 or 8"]),
    ("_head_group", {"model.num_query_heads": 34}, ["num_kv_heads=2", "groups of 17", "at least 3"]),
    ("_head_dim_even", {"model.head_dim": 33}, ["model.head_dim=33", "pairs", "even number"]),
    ("_windows", {"attention.init_tokens": 24}, ["attention.init_tokens=24", "block_tokens=16", "16 or 32"]),
    ("_windows", {"attention.local_tokens": 72}, ["attention.local_tokens=72", "64 or 80"]),
    ("_windows", {"attention.local_tokens": 8}, ["local_tokens=8", "current block", "at least 16"]),
    (
        "_sequence_and_block",
        {"data.seq_len_tokens": 8},
        ["seq_len_tokens=8", "block_tokens=16", "at least 16"],
    ),
    (
        "_selector_of_dense",
        {"attention.kind": AttentionKind.dense, "attention.selector": Selector.last_token},
        ["attention.selector=last_token", "selects nothing", "attention.kind=phsa"],
    ),
    (
        "_selector_impl",
        {"attention.select_impl": KernelImpl.reference},
        ["select_impl=reference", "without a kernel", "select_impl=null"],
    ),
    (
        "_selector_impl",
        {
            "attention.selector": Selector.minmax,
            "attention.impl": KernelImpl.triton,
            "cluster.device": Device.cuda,
        },
        ["attention.selector=minmax", "pooled vectors of a block", "mean_pool", "attention.impl=reference"],
    ),
    (
        "_selector_lambda",
        {"attention.selector": Selector.moba},
        ["mean_weight_frac=0.5", "moba has no second branch", "mean_weight_frac=1"],
    ),
    (
        "_selector_group_score",
        {
            "attention.selector": Selector.infllm_v2,
            "attention.mean_weight_frac": 1.0,
            "attention.group_score": GroupScore.raw_sum,
        },
        ["group_score=raw_sum", "infllm_v2 has its own", "softmax_sum"],
    ),
    (
        "_selector_blocks",
        {
            "attention.selector": Selector.infllm_v2,
            "attention.mean_weight_frac": 1.0,
            "attention.block_tokens": 8,
        },
        ["block_tokens=8", "multiple of 16"],
    ),
    (
        "_separators",
        {"attention.selector": Selector.separators},  # the demo has English and Chinese
        ["attention.selector=separators", "SepLLM", "punctuation_language=en"],
    ),
    ("_coarse_lse", {"attention.coarse_lse": True}, ["coarse_lse=True", "InfLLM-V2", "infllm_v2"]),
    (
        "_topk_without_selection",
        {
            "attention.selector": Selector.window,
            "attention.mean_weight_frac": 1.0,
            "attention.infer_topk": 4,
        },
        ["infer_topk=4", "window selects no block", "infer_topk=null"],
    ),
    ("_dense_layers", {"attention.dense_layers": [0]}, ["dense_layers=[0]", "from 1 to", "correct"]),
    ("_dense_layers", {"attention.dense_layers": [1, 1]}, ["dense_layers=[1, 1]", "at most once"]),
    (
        "_dense_layers",
        {"attention.dense_layers": [1], "attention.kind": AttentionKind.dense},
        ["dense_layers=[1]", "every layer dense"],
    ),
    (
        "_topk_schedule",
        {"attention.topk_schedule": TopkSchedule.anneal, "attention.topk_start": 2},
        ["topk_schedule=anneal", "topk_start=2", "train_topk=2", "more than 2"],
    ),
    ("_topk_schedule", {"attention.topk_start": 8}, ["topk_schedule=constant", "belong to anneal"]),
    (
        "_topk_schedule",
        {"attention.topk_schedule": TopkSchedule.random_step},
        ["topk_choices=[]", "random_step", "topk_choices=[1,2,4,8]"],
    ),
    ("_topk_schedule", {"attention.topk_choices": [1]}, ["topk_choices=[1]", "is constant"]),
    (
        "_topk_schedule_of_what",
        {
            "attention.kind": AttentionKind.dense,
            "attention.topk_schedule": TopkSchedule.random_step,
            "attention.topk_choices": [1, 2],
        },
        ["topk_schedule=random_step", "kind=dense has no k", "constant"],
    ),
    (
        "_topk_schedule_of_what",
        {"attention.kind": AttentionKind.dense, "attention.topk_dense_steps": 5},
        ["topk_dense_steps=5", "every step"],
    ),
    (
        "_topk_of_triton",
        {
            "attention.train_topk": 65,
            "attention.impl": KernelImpl.triton,
            "cluster.device": Device.cuda,
        },
        ["attention.train_topk=65", "at most 64", "reference"],
    ),
    (
        "_nvtx",
        {"monitoring.nvtx": True},
        ["monitoring.nvtx=true", "cluster.device=cpu", "set it to false"],
    ),
    (
        "_information",
        {"attention.kind": AttentionKind.dense, "monitoring.information_every_steps": 10},
        ["information_every_steps=10", "kind=dense has no blocks", "information_every_steps=0"],
    ),
    (
        "_max_documents",
        {"data.max_documents_per_sequence": 513},
        ["max_documents_per_sequence=513", "seq_len_tokens=512", "use at most 512"],
    ),
    ("_sources", {"data.sources": {}, "evaluate.every_steps": 0}, ["data.sources=0 sources", "data=NAME"]),
    (
        "_sources",
        {"data.sources.english.weight": 0.0, "data.sources.chinese.weight": 0.0},
        ["positive weight"],
    ),
    (
        "_validation_text",
        {"data.sources.english.valid_prefix": None, "data.sources.chinese.valid_prefix": None},
        ["evaluate.every_steps=100", "valid_prefix", "evaluate.every_steps=0"],
    ),
    (
        "_context_parallel",
        {"parallel.context_size": 2, "cluster.processes_per_node": 2, "data.seq_len_tokens": 520},
        ["data.seq_len_tokens=520", "2 x 2 x attention.block_tokens=16 = 64", "use 512 or 576"],
    ),
    (
        "_context_parallel",
        {
            "parallel.context_size": 4,
            "cluster.processes_per_node": 4,
            "attention.kind": AttentionKind.dense,
            "data.seq_len_tokens": 516,
        },
        ["data.seq_len_tokens=516", "multiple of 2 x 4 = 8", "use 512 or 520"],
    ),
    (
        "_context_exchange",
        {"attention.kind": AttentionKind.dense, "parallel.context_exchange": ContextExchange.block_sparse},
        ["context_exchange=block_sparse", "attends to every key", "context_exchange=all_gather"],
    ),
    (
        "_context_exchange",
        {"parallel.context_sharding": ContextSharding.contiguous, "model.mtp_num_layers": 1},
        ["context_sharding=contiguous", "model.mtp_num_layers=1", "set parallel.context_sharding=zigzag"],
    ),
    (
        "_context_nodes",
        {"parallel.context_size": 4, "cluster.processes_per_node": 4, "parallel.context_node_size": 3},
        ["context_node_size=3", "equal shares of parallel.context_size=4", "a divisor of 4"],
    ),
    (
        "_context_nodes",
        {
            "parallel.context_size": 4,
            "cluster.num_nodes": 2,
            "cluster.processes_per_node": 2,
            "parallel.context_node_size": 4,
        },
        ["context_node_size=4", "cluster.processes_per_node=2", "a smaller node size"],
    ),
    ("_experts", {"parallel.expert_size": 2}, ["expert_size=2", "model.num_experts=0", "expert_size=1"]),
    (
        "_experts",
        {"model.num_experts": 2, "model.expert_topk": 3},
        ["expert_topk=3", "model.num_experts=2", "use at most 2"],
    ),
    (
        "_experts",
        {"model.num_experts": 3, "parallel.expert_size": 2, "cluster.processes_per_node": 2, **SMALL},
        ["expert_size=2", "model.num_experts=3", "a divisor of 3"],
    ),
    (
        "_experts",
        {"model.num_experts": 4, "parallel.expert_size": 4, "cluster.processes_per_node": 2, **SMALL},
        ["expert_size=4", "processes of a pipeline stage, which are 2", "a divisor of 2"],
    ),
    (
        "_experts",
        {
            "model.num_experts": 4,
            "parallel.tensor_size": 2,
            "parallel.sequence_parallel": True,
            "cluster.processes_per_node": 2,
        },
        ["expert_size=1", "parallel.tensor_size=2", "expert_size=2 or more"],
    ),
    (
        "_experts",
        {
            "model.num_experts": 4,
            "parallel.tensor_size": 2,
            "parallel.expert_size": 2,
            "cluster.processes_per_node": 2,
        },
        ["sequence_parallel=False", "parallel.tensor_size=2", "sequence_parallel=true"],
    ),
    (
        "_processes_divide",
        {"parallel.tensor_size": 2, "cluster.processes_per_node": 3},
        ["processes_per_node=3", "2 tensor x 1 pipeline x 1 context = 2", "a multiple of 2"],
    ),
    (
        "_batch_divides",
        {"optim.micro_batch_sequences": 3},
        ["global_batch_sequences=8", "micro_batch_sequences=3 x 1", "use 6 or 9"],
    ),
    (
        "_layers_divide",
        {"parallel.pipeline_size": 3, "cluster.processes_per_node": 3},
        ["model.num_layers=4", "pipeline_size=3", "change the pipeline sizes"],
    ),
    (
        "_virtual_pipeline",
        {"parallel.virtual_pipeline_size": 2},
        ["virtual_pipeline_size=2", "pipeline_size of at least 2", "virtual_pipeline_size=null"],
    ),
    (
        "_virtual_pipeline",
        {
            "parallel.virtual_pipeline_size": 2,
            "parallel.pipeline_size": 2,
            "cluster.processes_per_node": 2,
        },
        ["groups of pipeline_size=2", "a step has 1", "a multiple of 16"],
    ),
    (
        "_tensor_parallel",
        {"parallel.tensor_size": 4, "cluster.processes_per_node": 4},
        ["model.num_kv_heads=2", "tensor_size=4", "divides 2"],
    ),
    (
        "_sequence_parallel",
        {"parallel.sequence_parallel": True},
        ["sequence_parallel=True", "tensor_size is 1", "sequence_parallel=false"],
    ),
    (
        "_sequence_parallel",
        {
            "parallel.sequence_parallel": True,
            "parallel.tensor_size": 2,
            "cluster.processes_per_node": 2,
            "data.seq_len_tokens": 511,
        },
        ["seq_len_tokens=511", "multiple of the tensor size"],
    ),
    (
        "_overlap",
        {
            "parallel.overlap_param_gather": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.distributed_optimizer": False,
        },
        ["overlap_param_gather=True", "distributed_optimizer=true"],
    ),
    ("_overlap", {"parallel.overlap_param_gather": True}, ["overlap_grad_reduce=true"]),
    (
        "_device_and_impl",
        {"attention.impl": KernelImpl.triton},
        ["attention.impl=triton", "cluster.device is cpu", "attention.impl=reference"],
    ),
    (
        "_schedule_lengths",
        {"optim.warmup_steps": 301},
        ["warmup_steps=301", "decay_steps=100", "train_steps=400", "more steps"],
    ),
    (
        "_warmup",
        {"optim.warmup_steps": 400, "optim.decay_steps": 0},
        ["warmup_steps=400", "train_steps=400", "at most 399"],
    ),
    (
        "_cosine",
        {"optim.schedule": LrSchedule.cosine},
        ["decay_steps=100", "schedule=cosine", "decay_steps=0"],
    ),
    ("_learning_rates", {"optim.min_lr": 1.0}, ["min_lr=1.0", "optim.lr=0.003", "lower it"]),
    (
        "_slurm_only",
        {"cluster.partition": "h100"},
        ["cluster.partition=h100", "scheduler is local", "cluster="],
    ),
    ("_slurm_only", {"cluster.chain": 2}, ["cluster.chain=2", "only Slurm"]),
    ("_time_limit", SLURM | {"cluster.time_limit": "86400"}, ["time_limit='86400'", "HH:MM:SS", "quotes"]),
    (
        "_time_limit",
        SLURM | {"cluster.time_limit": "00:05:00"},
        ["stop_lead_s=300", "00:05:00, which is 300 s"],
    ),
    (
        "_gpus",
        SLURM | {"cluster.gpus_per_node": 8},
        ["gpus_per_node=8", "device=cpu hides", "set it to null"],
    ),
    (
        "_gpus",
        SLURM
        | {
            "cluster.gpus_per_node": 4,
            "cluster.device": Device.cuda,
            "cluster.processes_per_node": 8,
            "optim.micro_batch_sequences": 1,
        },
        ["gpus_per_node=4", "processes_per_node=8", "ask for 8"],
    ),
    (
        "_sbatch_options",
        SLURM | {"cluster.sbatch": {"nodes": 3}},
        ["sbatch.nodes=3", "set cluster.num_nodes"],
    ),
    ("_sbatch_options", SLURM | {"cluster.sbatch": {"--mem": 3}}, ["sbatch.--mem=3", "without --"]),
    ("_one_line", SLURM | {"cluster.account": "a\nb"}, ["cluster.account='a\\nb'", "on one line"]),
    ("_environment", {"cluster.environment": {"A-B": "1"}}, ["cluster.environment.A-B='1'", "letters"]),
    ("_environment", {"cluster.environment": {"RANK": "1"}}, ["cluster.environment.RANK='1'", "its own"]),
    (
        "_containers",
        SLURM | {"cluster.container_mounts": ["/a:/a"]},
        ["container_mounts=['/a:/a']", "set cluster.container_image"],
    ),
    (
        "gpu_scores",
        {"health.gpu_scores_every_steps": 100},
        ["health.gpu_scores_every_steps=100", "cluster.device=cpu", "set it to 0"],
    ),
    (
        "watchdog_timeouts",
        {"health.step_timeout_s": 9.0},
        ["health.step_timeout_s=9", "heartbeat_every_s=5", "at least 10"],
    ),
    (
        "local_copy",
        {"checkpoint.local_copy_dir": "copies"},
        ["checkpoint.local_copy_dir=copies", "own disk", "absolute path"],
    ),
]
