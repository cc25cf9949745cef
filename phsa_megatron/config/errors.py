"""Errors meant for people: each message names the field or file, the value, the rule and the fix."""

from __future__ import annotations


class PhsaError(Exception):
    """Base of all errors that end a command with a message instead of a traceback."""


class ConfigError(PhsaError):
    """A setting is unknown, of the wrong type, or breaks a rule."""


class DataError(PhsaError):
    """Text, tokenizer or a prepared data set is missing, damaged or does not match."""


class CheckpointError(PhsaError):
    """A checkpoint is missing, damaged or does not match the run."""


class DeviceError(PhsaError):
    """A device or a library that the run asks for is not there."""


class TrainingError(PhsaError):
    """Training stopped by itself, for a reason that the message gives."""


def broken_rule(field: str, value: object, rule: str, fix: str) -> str:
    """Return the line about a broken rule: which setting, what it says, what holds and what to do."""
    return f"{field}={value}: {rule}; {fix}"
