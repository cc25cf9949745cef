"""Two processes compute every selector under context parallelism and compare with one process's answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

S, B, D, M, HEADS, KV = 128, 2, 8, 16, 4, 2
BOUNDS = [0, 9, 128, 200, 256]


def main(folder: Path) -> None:
    from phsa_megatron.parallel import cpu_shim

    cpu_shim.install(hide_gpu=True)
    from megatron.core.transformer.enums import AttnMaskType

    from phsa_megatron.attention.core_attention import PHSACoreAttention
    from phsa_megatron.attention.punctuation import PunctuationTable
    from phsa_megatron.attention.side_info import SideInfo
    from phsa_megatron.config.schema import AttentionConfig, PunctuationLanguage, PunctuationMatch, Selector
    from phsa_megatron.config.selector_kinds import WITH_PARAMETERS, WITHOUT_SECOND_BRANCH
    from phsa_megatron.parallel.sequence_sharding import own_positions

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = own_positions(S, 2, rank)
    words = ["." if token % 5 == 0 else "a" for token in range(50)]
    table = PunctuationTable.build(words, PunctuationMatch.exact, PunctuationLanguage.en)
    tokens = torch.randint(0, 50, (B, S), generator=torch.Generator().manual_seed(0))
    results = {}
    for selector in sorted(set(Selector) - WITH_PARAMETERS):  # those are refused under context parallelism
        lam = 1.0 if selector in WITHOUT_SECOND_BRANCH else 0.5
        settings = AttentionConfig(
            selector=selector, block_tokens=M, init_tokens=M, local_tokens=M, mean_weight_frac=lam
        )
        g = torch.Generator().manual_seed(1)
        whole = [
            torch.randn(S, B, h, D, dtype=torch.float64, generator=g, requires_grad=True)
            for h in (HEADS, KV, KV)
        ]
        upstream = torch.randn(S, B, HEADS * D, dtype=torch.float64, generator=g)
        part = [x.detach()[own].clone().requires_grad_() for x in whole]
        outs = []
        for size, inputs in ((1, whole), (2, part)):
            config = SimpleNamespace(attention_dropout=0.0, context_parallel_size=size)
            groups = SimpleNamespace(cp=dist.group.WORLD)
            attention = PHSACoreAttention(
                config, 1, AttnMaskType.causal, "self", pg_collection=groups, attention=settings
            )
            side = SideInfo.build(tokens, torch.tensor(BOUNDS, dtype=torch.int32), table, settings, 2)
            out = attention(*inputs, None, packed_seq_params=side)
            out.backward(upstream if size == 1 else upstream[own])
            outs.append(out)
        differences = {"out": (outs[1] - outs[0][own]).abs().max().item()}
        for name, one, mine in zip("qkv", whole, part, strict=True):
            differences[name] = (mine.grad - one.grad[own]).abs().max().item()
        # Negative control: the other process's queries would not do.
        other = own_positions(S, 2, 1 - rank)
        differences["control"] = (outs[1] - outs[0][other]).abs().max().item()
        results[selector.value] = differences
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()
