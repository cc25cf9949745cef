"""Training sequences that a run passes over: `data.skip_sequences`, and what may change in it on resume.

A sequence keeps its number whether or not it is passed over, so that numbers in alerts, in `show-batch` and
here mean the same text. A checkpoint records the list that its run had: what lies behind it cannot change.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from phsa_megatron.config.errors import ConfigError

Range = tuple[int, int]
"""Half-open: first sequence, and the one after the last."""


def skipped_ranges(texts: Sequence[str]) -> list[Range]:
    """Return the ranges of a list such as `["800-815", "2001"]`, sorted and merged.

    Raises:
        ConfigError: an entry is neither a number nor FIRST-LAST.
    """
    ranges = []
    for text in texts:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(text))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(
                f"data.skip_sequences has {text!r}: an entry is the number of a sequence, or FIRST-LAST with "
                "both of them passed over, such as '800-815'"
            )
        ranges.append((first, last + 1))
    merged: list[Range] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return merged


def number_at(position: int, skipped: Sequence[Range]) -> int:
    """Return the number of the sequence at a position of the data: what is passed over has no position."""
    for first, end in skipped:
        if position < first:
            break
        position += end - first
    return position


def check_skip_list(recorded: Sequence[Range], wanted: Sequence[Range], consumed_sequences: int) -> None:
    """Check that a run may go on with another list than its checkpoint's.

    Args:
        recorded: the list that the checkpoint's run had.
        wanted: the list of the run that goes on.
        consumed_sequences: what the checkpoint is trained on.

    Raises:
        ConfigError: they differ in sequences that lie behind the checkpoint.
    """
    next_number = number_at(consumed_sequences - 1, recorded) + 1 if consumed_sequences else 0
    before, after = (
        [r for r in (_until(r, next_number) for r in ranges) if r] for ranges in (recorded, wanted)
    )
    if before != after:
        raise ConfigError(
            f"data.skip_sequences differs from the checkpoint's before sequence {next_number}, where it "
            f"stands: {_shown(wanted)} now, {_shown(recorded)} then. What is trained on cannot be "
            "passed over, nor be brought back: keep that part of the list, and go back to an earlier "
            "checkpoint (move the later folders out of RUN/checkpoints) to pass over what came before."
        )


def _until(span: Range, end: int) -> Range | None:
    return (span[0], min(span[1], end)) if span[0] < end else None


def _shown(ranges: Sequence[Range]) -> str:
    return ", ".join(f"{first}-{end - 1}" for first, end in ranges) or "nothing"
