"""Names of the nodes of a job, for messages about nodes that say nothing themselves."""

from __future__ import annotations

import os
import subprocess

_TIMEOUT_S = 10.0


def node_names() -> list[str]:
    """The nodes of this Slurm job in the order of their node ranks; empty outside of a job."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    if not listed:
        return []
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []


def describe_node(node_rank: int, names: list[str]) -> str:
    """A node for people: `node rank 2 (n3)`, without the name where it is not known."""
    return (
        f"node rank {node_rank} ({names[node_rank]})" if node_rank < len(names) else f"node rank {node_rank}"
    )
