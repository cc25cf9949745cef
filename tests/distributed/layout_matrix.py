"""Which layouts are tried with which models, and the table of them in docs/layouts.md.

    PYTHONPATH=.:kernels:launch python tests/distributed/layout_matrix.py

prints the table; a test holds the page to it.
"""

from __future__ import annotations

from typing import Any

from phsa_megatron.config.schema import (
    AttentionKind,
    ContextExchange,
    ContextSharding,
    Dtype,
    Loss,
    Recompute,
    Selector,
)

# Blocks of 16 and windows of 32 in sequences of 64 tokens: few, but some to choose from.
_NSA = {
    "attention__selector": Selector.nsa,
    "attention__mean_weight_frac": 1.0,
    "attention__block_tokens": 16,
    "attention__init_tokens": 0,
    "attention__local_tokens": 16,
    "attention__train_topk": 1,
    "attention__nsa_window_tokens": 12,
}
# Two sequences a micro-batch, against one process with one: layers see them as one row, but for CP and SP.
ROWS2 = {"optim__micro_batch_sequences": 2}
_EXPERTS = {"model__num_experts": 8, "model__expert_topk": 3, "model__expert_balance_coeff": 0.1}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied_mtp": {"model__tie_embeddings": True, "model__mtp_num_layers": 1},
    "tied": {"model__tie_embeddings": True},
    "dense": {"attention__kind": AttentionKind.dense},
    "bf16": {"run__dtype": Dtype.bf16},
    "chunked": {
        "compute__loss": Loss.chunked,
        "compute__loss_chunk_tokens": 24,
        "model__tie_embeddings": True,
    },
    "experts": _EXPERTS,
    # Experts are balanced within a micro-batch: its size is part of the loss.
    "experts_rows2": _EXPERTS | ROWS2,
    "nsa": _NSA,
    "indexer": {"attention__selector": Selector.indexer, "attention__mean_weight_frac": 1.0},
    "aligned": {"attention__align_coeff": 10.0},
}
TP2, PP2, CP2 = ({f"parallel__{kind}_size": 2} for kind in ("tensor", "pipeline", "context"))
SP, VPP2 = {"parallel__sequence_parallel": True}, {"parallel__virtual_pipeline_size": 2}
FULL, SELECTIVE = ({"parallel__recompute": r} for r in (Recompute.full, Recompute.selective))
CP4 = {"parallel__context_size": 4}
SPARSE, AUTO = (
    {"parallel__context_exchange": exchange}
    for exchange in (ContextExchange.block_sparse, ContextExchange.auto)
)
CONTIGUOUS = {"parallel__context_sharding": ContextSharding.contiguous}
# Nodes of two context-parallel processes each.
EP2, EP4 = ({"parallel__expert_size": size} for size in (2, 4))
NODES = {"parallel__context_node_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 | SP),
    "tp2_sp_mlp": (2, TP2 | SP | {"parallel__recompute": Recompute.mlp}),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2 | VPP2),
    "dp2": (2, {}),
    "dp2_ep2": (2, EP2),
    "cp2": (2, CP2),
    "cp2_ep2": (2, CP2 | EP2),
    "cp2_full": (2, CP2 | FULL),
    "cp2_sparse": (2, CP2 | SPARSE),
    "cp2_sparse_full": (2, CP2 | SPARSE | FULL),
    "cp2_contiguous": (2, CP2 | CONTIGUOUS),
    "cp4": (4, CP4),
    "cp4_selective": (4, CP4 | SELECTIVE),
    "cp4_sparse": (4, CP4 | SPARSE),
    "cp4_sparse_selective": (4, CP4 | SPARSE | SELECTIVE),
    "cp4_auto": (4, CP4 | AUTO),
    "cp4_contiguous": (4, CP4 | CONTIGUOUS),
    "cp4_contiguous_sparse": (4, CP4 | CONTIGUOUS | SPARSE),
    "cp4_nodes": (4, CP4 | NODES),
    "cp4_nodes_sparse": (4, CP4 | NODES | SPARSE),
    "cp4_nodes_contiguous_auto_full": (4, CP4 | NODES | CONTIGUOUS | AUTO | FULL),
    "tp2_cp2_sp": (4, TP2 | CP2 | SP),
    "tp2_cp2_sp_sparse": (4, TP2 | CP2 | SP | SPARSE),
    "cp2_pp2": (4, CP2 | PP2),
    "cp2_pp2_sparse_full": (4, CP2 | PP2 | SPARSE | FULL),
    "cp2_pp2_full": (4, CP2 | PP2 | FULL),
    "cp2_pp2_vpp2": (4, CP2 | PP2 | VPP2),
    "dp2_cp2": (4, CP2),
    "dp2_cp2_contiguous_sparse": (4, CP2 | CONTIGUOUS | SPARSE),
    "pp4": (4, {"parallel__pipeline_size": 4}),
    "tp2_pp2_vpp2_sp": (4, TP2 | PP2 | VPP2 | SP),
    "tp2_sp_ep2": (2, TP2 | SP | EP2),
    "tp2_sp_dp2_ep2": (4, TP2 | SP | EP2),
    "pp2_dp2_ep2": (4, PP2 | EP2),
    "dp2_cp2_ep4_sparse": (4, CP2 | EP4 | SPARSE),
    "tp2_pp2_vpp2_sp_full": (4, TP2 | PP2 | VPP2 | SP | FULL),
    "rows2": (1, ROWS2),
    "rows2_full": (1, ROWS2 | FULL),
    "tp2_rows2": (2, TP2 | ROWS2),
    "tp2_sp_rows2": (2, TP2 | SP | ROWS2),
    "pp2_rows2": (2, PP2 | ROWS2),
    "pp2_rows2_full": (2, PP2 | ROWS2 | FULL),
    "pp2_vpp2_rows2": (2, PP2 | VPP2 | ROWS2),
    "dp2_rows2": (2, ROWS2),
    "dp2_ep2_rows2": (2, EP2 | ROWS2),
    "cp2_rows2": (2, CP2 | ROWS2),
    "tp2_cp2_pp2": (8, TP2 | CP2 | PP2),
    "tp2_cp4_nodes_sparse": (8, TP2 | CP4 | NODES | SPARSE),
    "tp2_cp2_pp2_sp_full": (8, TP2 | CP2 | PP2 | SP | FULL),
}
# What each number of processes has been tried with first; the other layouts run the cases that differ there.
BASIC = ("tp2", "tp2_sp", "pp2", "pp2_vpp2", "dp2")
CASES = [
    *((layout, variant) for layout in BASIC for variant in ("plain", "tied_mtp")),
    *((layout, "plain") for layout in LAYOUTS if layout not in BASIC and "_ep" not in layout),
    *((layout, "tied_mtp") for layout in ("rows2", "pp2_rows2", "pp2_vpp2_rows2")),
    *(("rows2", variant) for variant in ("dense", "bf16", "chunked", "nsa", "indexer", "aligned")),
    *(("pp2_rows2", variant) for variant in ("dense", "chunked")),
    ("pp2_vpp2_rows2", "nsa"),
    ("tp2_rows2", "indexer"),
    ("dp2_rows2", "aligned"),
    *((layout, "experts") for layout in ("pp2", "dp2", "cp2")),
    *((layout, "experts") for layout in LAYOUTS if "_ep" in layout and "rows2" not in layout),
    *((layout, "experts_rows2") for layout in ("pp2_rows2", "dp2_ep2_rows2", "cp2_rows2")),
    *((layout, "chunked") for layout in ("tp2", "tp2_sp", "pp2", "dp2", "cp2", "tp2_cp2_sp")),
    ("cp2_pp2", "tied"),
    ("cp2", "tied_mtp"),
    ("cp4", "tied_mtp"),
    ("cp2_sparse", "tied_mtp"),
    ("cp2_pp2", "tied_mtp"),
    ("tp2_cp2_sp", "tied_mtp"),
    ("cp2", "bf16"),
    ("cp4", "bf16"),
    ("cp4_sparse", "bf16"),
    ("cp4_nodes_sparse", "bf16"),
    ("cp4_contiguous", "bf16"),
    ("dp2_cp2", "bf16"),
    ("cp2", "dense"),
    ("cp4", "dense"),
    ("cp4_contiguous", "dense"),
    ("cp4_nodes", "dense"),
    ("tp2_cp2_sp", "dense"),
    *((layout, "nsa") for layout in ("tp2", "tp2_sp", "pp2_vpp2", "dp2", "tp2_pp2_vpp2_sp_full")),
    *((layout, "indexer") for layout in ("tp2", "dp2", "tp2_pp2_vpp2_sp_full")),
    *((layout, "aligned") for layout in ("tp2_sp", "dp2", "tp2_pp2_vpp2_sp_full")),
]


_HEADINGS = {
    "plain": "PHSA",
    "tied": "PHSA, tied embeddings",
    "tied_mtp": "PHSA, tied embeddings, multi-token prediction",
    "dense": "dense",
    "bf16": "PHSA, bf16",
    "chunked": "PHSA, tied embeddings, loss in chunks",
    "experts": "PHSA, experts",
    "experts_rows2": "PHSA, experts, two sequences a micro-batch",
    "nsa": "NSA",
    "indexer": "block indexer",
    "aligned": "PHSA, alignment loss",
}


def passes(layout: str) -> int:
    """Return how often a layer's attention runs forward: recomputation runs it again."""
    mode = LAYOUTS[layout][1].get("parallel__recompute", Recompute.none)
    return 1 if mode in (Recompute.none, Recompute.mlp) else 2


def table() -> str:
    """Return the layouts as a Markdown table, one line each."""
    columns = ["processes", "rows", "TP", "SP", "PP", "VPP", "CP", "DP", "EP"]
    columns += ["sharding", "exchange", "nodes", "recompute", *_HEADINGS.values()]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for layout, (processes, changes) in LAYOUTS.items():
        sizes = {kind: changes.get(f"parallel__{kind}_size", 1) for kind in ("tensor", "pipeline", "context")}
        copies = processes // (sizes["tensor"] * sizes["pipeline"] * sizes["context"])
        cells = [
            processes,
            changes.get("optim__micro_batch_sequences", 1),
            sizes["tensor"],
            "yes" if "parallel__sequence_parallel" in changes else "no",
            sizes["pipeline"],
            changes.get("parallel__virtual_pipeline_size", 1),
            sizes["context"],
            copies,
            changes.get("parallel__expert_size", 1),
            *_context(changes),
            changes.get("parallel__recompute", Recompute.none).value,
            *("equal" if (layout, variant) in CASES else "" for variant in _HEADINGS),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _context(changes: dict[str, Any]) -> list[str]:
    """Return how a layout's context-parallel processes share sequences: sharding, exchange, nodes."""
    size = changes.get("parallel__context_size", 1)
    if size == 1:
        return ["", "", ""]
    node_size = changes.get("parallel__context_node_size", size)
    return [
        changes.get("parallel__context_sharding", ContextSharding.zigzag).value,
        changes.get("parallel__context_exchange", ContextExchange.all_gather).value,
        f"{size // node_size} x {node_size}" if node_size < size else "1",
    ]


if __name__ == "__main__":
    print(table())
