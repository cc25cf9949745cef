"""What the reports of all nodes say together: who differs in versions, and whose clock is off."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from phsa_megatron.preflight.checks import Check, Status


def versions(all_facts: Mapping[int, Mapping[str, str]], node_rank: int) -> Check:
    """Compare a node's versions with what most nodes have; where two are as frequent, node 0's counts.

    Args:
        all_facts: the versions of every node, by node rank.
        node_rank: the node that is judged.
    """
    rule = "all nodes have the same"
    names = sorted({name for facts in all_facts.values() for name in facts})
    faults = []
    for name in names:
        values = {rank: facts.get(name, "none") for rank, facts in sorted(all_facts.items())}
        counts = Counter(values.values())  # in the order of ranks, and the first of equals wins
        usual, num_usual = counts.most_common(1)[0]
        if values[node_rank] != usual:
            faults.append(f"{name} {values[node_rank]}, {num_usual} of {len(values)} nodes have {usual}")
    if faults:
        return Check("versions", Status.bad, "; ".join(faults), rule)
    if len(all_facts) == 1:
        return Check("versions", Status.not_applicable, "one node", rule)
    return Check("versions", Status.ok, f"{len(names)} equal on {len(all_facts)} nodes", rule)


def clocks(offsets_s: Mapping[int, float], node_rank: int, max_skew_s: float) -> Check:
    """Compare a node's clock with the median of all; of two nodes, node 0 is right.

    Args:
        offsets_s: how far each node's clock is ahead of node 0's, by node rank.
        node_rank: the node that is judged.
        max_skew_s: how far it may be off.
    """
    rule = f"at most health.max_clock_skew_s={max_skew_s:g} s from the others"
    if len(offsets_s) == 1:
        return Check("clock", Status.not_applicable, "one node", rule)
    usual = 0.0 if len(offsets_s) == 2 else statistics.median(offsets_s.values())
    off = offsets_s[node_rank] - usual
    status = Status.bad if abs(off) > max_skew_s else Status.ok
    return Check("clock", status, f"{off:+.3f} s from the others", rule)
