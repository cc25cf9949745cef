"""How far a preparation is: a bar on a terminal, one line for each shard elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from phsa_megatron.data.readers import Shard
from phsa_megatron.data.shards import ShardResult


class ShardProgress:
    """Shows finished shards on standard error, measured in bytes of the input files."""

    def __init__(self, title: str, shards: Sequence[Shard]) -> None:
        """Prepare a display for these shards; it shows while it is used as a context manager."""
        self._title = title
        self._num_shards = len(shards)
        self._num_finished = self._num_kept = self._num_tokens = self._num_bad = 0
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[counts]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=sum(shard.num_bytes for shard in shards), counts="")

    def __enter__(self) -> ShardProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def finished(self, shard: Shard, result: ShardResult, kept: bool) -> None:
        """Count a shard as finished; `kept` says that an earlier run had finished it."""
        self._num_finished += 1
        self._num_kept += kept
        self._num_tokens += result.num_tokens
        self._num_bad += result.num_bad_records
        counts = f"{self._num_tokens:,} tokens"
        if self._num_kept:
            counts += f", {self._num_kept} shards kept"
        if self._num_bad:
            counts += f", {self._num_bad:,} bad records"
        self._bar.update(self._task, advance=shard.num_bytes, counts=counts)
        if not self._console.is_terminal:
            self._console.print(
                f"{self._title}: shard {self._num_finished}/{self._num_shards}, {counts}", soft_wrap=True
            )
