"""The part of `broken_rules.py` on selectors with weights and on losses between attentions."""

from phsa_megatron.config.schema import AttentionKind, Recompute, Selector

NSA: dict[str, object] = {
    "attention.selector": Selector.nsa,
    "attention.nsa_window_tokens": 64,
    "attention.mean_weight_frac": 1.0,
}
INDEXER: dict[str, object] = {"attention.selector": Selector.indexer, "attention.mean_weight_frac": 1.0}
CONTEXT2: dict[str, object] = {"parallel.context_size": 2, "cluster.processes_per_node": 2}
BROKEN_LEARNED = [
    (
        "_nsa_window",
        {"attention.selector": Selector.nsa, "attention.mean_weight_frac": 1.0},
        ["nsa_window_tokens=None", "sliding-window branch", "attention=nsa"],
    ),
    (
        "_nsa_window",
        {"attention.nsa_window_tokens": 64},
        ["nsa_window_tokens=64", "selector=phsa has no", "null"],
    ),
    (
        "_settings_of_another_selector",
        {"attention.indexer_heads": 8},
        ["indexer_heads=8", "selector=indexer", "leave attention.indexer_heads=4"],
    ),
    (
        "_settings_of_another_selector",
        {"attention.align_full_frac": 0.25},
        ["align_full_frac=0.25", "align_coeff is 0", "align_coeff=10"],
    ),
    (
        "_align",
        {"attention.align_coeff": 10.0, "attention.kind": AttentionKind.dense},
        ["align_coeff=10", "kind=dense", "does not have both", "attention=phsa"],
    ),
    (
        "_align",
        {
            "attention.align_coeff": 10.0,
            "attention.selector": Selector.window,
            "attention.mean_weight_frac": 1.0,
        },
        ["align_coeff=10", "selector=window", "align_coeff=0"],
    ),
    ("_align", NSA | {"attention.align_coeff": 1.0}, ["align_coeff=1", "selector=nsa"]),
    ("_learned_context", NSA | CONTEXT2, ["context_size=2", "selector=nsa reads whole", "context_size=1"]),
    ("_learned_context", INDEXER | CONTEXT2, ["context_size=2", "selector=indexer"]),
    ("_learned_context", {"attention.align_coeff": 10.0} | CONTEXT2, ["context_size=2", "align_coeff=10"]),
    (
        "_learned_everywhere",
        INDEXER | {"attention.dense_layers": [1]},
        ["dense_layers=[1]", "selector=indexer has weights", "dense_layers=[]"],
    ),
    ("_learned_everywhere", NSA | {"attention.topk_dense_steps": 5}, ["topk_dense_steps=5", "steps=0"]),
    ("_learned_everywhere", NSA | {"attention.dense_len_tokens": 64}, ["dense_len_tokens=64", "tokens=0"]),
    (
        "_nsa_recompute",
        NSA | {"parallel.recompute": Recompute.selective},
        ["recompute=selective", "layer's input", "full or none"],
    ),
]
