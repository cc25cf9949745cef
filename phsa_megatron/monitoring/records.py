"""Reading `metrics.jsonl`: `config/records.py`, where the launcher, which has no torch, reads it too."""

from phsa_megatron.config.records import (
    NON_FINITE,
    START_EVENT,
    Event,
    Launch,
    LoggedRow,
    Records,
    read_launches,
    read_records,
)

__all__ = [
    "NON_FINITE",
    "START_EVENT",
    "Event",
    "Launch",
    "LoggedRow",
    "Records",
    "read_launches",
    "read_records",
]
