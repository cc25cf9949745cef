"""The part of `broken_rules.py` on `compute` and recomputation."""

from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    CudaGraphs,
    Device,
    Elementwise,
    Fp8,
    KernelImpl,
    Layers,
    Loss,
    Norm,
    Recompute,
    Selector,
    TopkSchedule,
)

BROKEN_COMPUTE = [
    (
        "_chunked_loss",
        {"compute.loss": Loss.chunked, "model.mtp_num_layers": 1},
        ["compute.loss=chunked", "mtp_num_layers=1", "set compute.loss=whole"],
    ),
    (
        "_compiled",
        {"compute.elementwise": Elementwise.compiled},
        ["compute.elementwise=compiled", "cluster.device=cpu", "elementwise=unfused"],
    ),
    (
        "_norm",
        {"compute.norm": Norm.triton},
        ["compute.norm=triton", "cluster.device=cpu", "set compute.norm=torch"],
    ),
    (
        "_norm",
        {
            "compute.norm": Norm.triton,
            "cluster.device": Device.cuda,
            "compute.layers": Layers.transformer_engine,
        },
        ["compute.norm=triton", "norms of their own", "compute.layers=local"],
    ),
    (
        "_norm",
        {"compute.norm": Norm.triton, "cluster.device": Device.cuda, "model.hidden_size": 16400},
        ["compute.norm=triton", "up to 16384", "model.hidden_size=16400", "set compute.norm=torch"],
    ),
    (
        "_recompute_layers",
        {"parallel.recompute_layers": 1},
        ["parallel.recompute_layers=1", "parallel.recompute=none", "set parallel.recompute=full"],
    ),
    (
        "_recompute_layers",
        {"parallel.recompute": Recompute.full, "parallel.recompute_layers": 5},
        ["parallel.recompute_layers=5", "layers", "null for all"],
    ),
    (
        "_fp8",
        {"compute.fp8": Fp8.tensorwise},
        ["compute.fp8=tensorwise", "compute.layers=local", "set compute.layers=transformer_engine"],
    ),
    (
        "_transformer_engine",
        {"compute.layers": Layers.transformer_engine},
        ["compute.layers=transformer_engine", "needs a GPU", "set compute.layers=local"],
    ),
    (
        "_fused_weight_gradient",
        {"compute.fused_weight_gradient": True},
        ["compute.fused_weight_gradient=True", "apex", "cluster.device=cuda"],
    ),
]

_GRAPHS = {
    "compute.cuda_graphs": CudaGraphs.micro_batch,
    "compute.loss": Loss.chunked,
    "cluster.device": Device.cuda,
    "attention.impl": KernelImpl.triton,
}
BROKEN_COMPUTE += [
    ("cuda_graphs", _GRAPHS | settings, ["compute.cuda_graphs=micro_batch", *words])
    for settings, words in (
        (
            {"cluster.device": Device.cpu, "attention.impl": KernelImpl.reference},
            ["graphs are CUDA's", "set cluster.device=cuda, or compute.cuda_graphs=none"],
        ),
        ({"parallel.overlap_grad_reduce": True}, ["no communication but", "overlap_grad_reduce to false"]),
        (
            {"parallel.tensor_size": 2, "cluster.processes_per_node": 2},
            ["no communication but the exchange of keys (parallel.tensor_size=2)", "sizes to 1"],
        ),
        (
            {
                "parallel.context_size": 2,
                "parallel.context_exchange": ContextExchange.auto,
                "cluster.processes_per_node": 2,
            },
            ["parallel.context_exchange=auto", "set parallel.context_exchange=all_gather"],
        ),
        ({"parallel.recompute": Recompute.mlp}, ["parallel.recompute=mlp", "set parallel.recompute=none"]),
        ({"compute.loss": Loss.whole}, ["compute.loss=whole", "set compute.loss=chunked"]),
        ({"compute.fused_weight_gradient": True}, ["compute.fused_weight_gradient=True", "=false"]),
        ({"model.num_experts": 4}, ["model.num_experts=4", "set both to 0"]),
        (
            {"attention.topk_schedule": TopkSchedule.random_step, "attention.topk_choices": [1, 2]},
            ["topk_schedule=random_step", "constant or anneal"],
        ),
        ({"attention.kind": AttentionKind.dense}, ["one by one", "set data.isolate_documents=false"]),
        (
            {"attention.selector": Selector.minmax, "attention.select_impl": KernelImpl.reference},
            ["selector=minmax", "attention.impl=triton"],
        ),
    )
]
