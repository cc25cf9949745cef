"""The part of `broken_rules.py` on `compute` and recomputation."""

from phsa_megatron.config.schema import Device, Elementwise, Fp8, Layers, Loss, Norm, Recompute

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
