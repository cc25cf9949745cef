"""The exit codes of the training process and of the preflight; docs/health.md lists them for people."""

FAILED = 1
"""The process failed; its line is in RUN/logs/error_rank_#####.jsonl."""
NODE_BAD = 3
"""Preflight: this node must not take part."""
NODE_UNCHECKED = 4
"""Preflight: this node could not be checked, or others are missing."""
HUNG = 70
"""The watchdog ended the process: no progress for the time that health.* allows."""
PEER_FAILED = 71
"""The watchdog ended the process because another one failed and this one waited for it."""
