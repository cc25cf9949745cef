"""Text files to one prepared data set: Megatron's .bin and .idx, and a .json that says what is in them.

The text is cut into shards, which worker processes encode independently into `PREFIX.parts/`. When all are
finished, they are merged in order into temporary files, which are read back and checked, and renamed; the
.json comes last and marks the set as complete. Killed at any moment, the same command goes on from the
finished shards, and nothing unfinished ever has a final name. The result does not depend on the number of
workers.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from phsa_megatron.config.errors import DataError
from phsa_megatron.data.manifest import FileRecord, Manifest, file_of, sync_folder, write_json_durably
from phsa_megatron.data.progress import ShardProgress
from phsa_megatron.data.readers import SHARD_BYTES, Shard, cut
from phsa_megatron.data.shards import (
    BAD_RECORDS_KEPT,
    ShardResult,
    encode_in_worker,
    encode_shard,
    finished_result,
    full_disk_is_a_data_error,
    start_worker,
)
from phsa_megatron.data.tokenizer import Tokenizer

PARTS_VERSION = 1
_BAD_RECORDS_SHOWN = 20


@dataclass(frozen=True)
class PrepareRequest:
    """What to prepare.

    Attributes:
        inputs: text files, in the order of the documents.
        output: prefix of the files to write.
        tokenizer_file: a Hugging Face tokenizer.json.
        eod_token: token appended to every document.
        text_field: field of a .jsonl record or column of a .parquet file.
        num_workers: processes; 1 encodes in this one.
        max_bad_records: with more bad records than this, nothing is written.
        overwrite: replace an existing set.
        shard_bytes: size of a shard of a .jsonl file.
    """

    inputs: Sequence[Path]
    output: Path
    tokenizer_file: Path
    eod_token: str = "<|endoftext|>"
    text_field: str = "text"
    num_workers: int = 1
    max_bad_records: int = 0
    overwrite: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class _Plan:
    files: list[FileRecord]
    shards: list[Shard]
    tokenizer: Tokenizer
    dtype: str
    text_field: str

    def identity(self) -> str:
        """Return a hash of all that the shards' content depends on."""
        content = [
            PARTS_VERSION,
            [dataclasses.astuple(file) for file in self.files],
            [dataclasses.astuple(shard) for shard in self.shards],
            self.tokenizer.sha256,
            self.tokenizer.eod_id,
            self.text_field,
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def prepare(request: PrepareRequest) -> Manifest:
    """Write a prepared data set and return its manifest.

    Raises:
        DataError: an input or the tokenizer is missing or damaged, there are more bad records than allowed or
            no document at all, the set exists, another process prepares it, or the disk is full.
    """
    if not request.inputs:
        raise DataError("no input file: name at least one with --input.")
    if request.num_workers < 1:
        raise DataError(f"--workers {request.num_workers}: at least one process is needed.")
    final = file_of(request.output, ".json")
    if final.exists() and not request.overwrite:
        raise DataError(
            f"{final} exists: the set is prepared. Use --overwrite to replace it, or another --output."
        )
    tokenizer = Tokenizer.from_file(request.tokenizer_file, request.eod_token)
    parts = file_of(request.output, ".parts")
    with full_disk_is_a_data_error(parts):
        parts.mkdir(parents=True, exist_ok=True)
    with _locked(parts):
        plan = _make_plan(request, tokenizer)
        _keep_parts_of_this_plan_only(parts, plan)
        results = _encode(request, plan, parts)
        _check_results(request, results)
        manifest = _merge(request, plan, parts, results)
        shutil.rmtree(parts)
    return manifest


@contextmanager
def _locked(parts: Path) -> Iterator[None]:
    with (parts / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process is preparing this set ({parts} is locked). Wait for it, or choose another "
                f"--output."
            ) from None
        yield


def _make_plan(request: PrepareRequest, tokenizer: Tokenizer) -> _Plan:
    # Hashing releases the interpreter lock, so threads read several files at once.
    with ThreadPoolExecutor(max_workers=request.num_workers) as pool:
        cuts = list(pool.map(lambda path: cut(Path(path), request.shard_bytes), request.inputs))
    return _Plan(
        files=[file for file, _ in cuts],
        shards=[shard for _, shards in cuts for shard in shards],
        tokenizer=tokenizer,
        dtype=np.dtype(DType.optimal_dtype(tokenizer.vocab_size)).name,
        text_field=request.text_field,
    )


def _keep_parts_of_this_plan_only(parts: Path, plan: _Plan) -> None:
    """Remove the parts of another plan: other inputs, another tokenizer, another cut."""
    plan_file = parts / "plan.json"
    try:
        same = json.loads(plan_file.read_text())["identity"] == plan.identity()
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same:
        return
    for path in parts.iterdir():
        if path.name != "lock":
            path.unlink()
    with full_disk_is_a_data_error(plan_file):
        write_json_durably(plan_file, {"identity": plan.identity()})


def _encode(request: PrepareRequest, plan: _Plan, parts: Path) -> list[ShardResult]:
    results: dict[int, ShardResult] = {}
    with ShardProgress(request.output.name, plan.shards) as progress:
        pending = []
        for index, shard in enumerate(plan.shards):
            earlier = finished_result(_stem(parts, index))
            if earlier is None:
                pending.append(index)
            else:
                results[index] = earlier
                progress.finished(shard, earlier, kept=True)
        if request.num_workers == 1 or len(pending) <= 1:
            for index in pending:
                shard = plan.shards[index]
                results[index] = encode_shard(
                    shard, plan.text_field, plan.dtype, _stem(parts, index), plan.tokenizer
                )
                progress.finished(shard, results[index], kept=False)
        else:
            for index, result in _encode_in_workers(request, plan, parts, pending):
                results[index] = result
                progress.finished(plan.shards[index], result, kept=False)
    return [results[index] for index in range(len(plan.shards))]


def _encode_in_workers(
    request: PrepareRequest, plan: _Plan, parts: Path, pending: list[int]
) -> Iterator[tuple[int, ShardResult]]:
    pool = ProcessPoolExecutor(
        max_workers=min(request.num_workers, len(pending)),
        # Spawned, not forked: this process may have threads, and the workers need neither torch nor megatron.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(request.tokenizer_file, request.eod_token),
    )
    try:
        futures: dict[Future[ShardResult], int] = {
            pool.submit(
                encode_in_worker, plan.shards[index], plan.text_field, plan.dtype, _stem(parts, index)
            ): index
            for index in pending
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died, most likely for lack of memory. Finished shards are kept in {parts}: "
            f"run the same command with fewer --workers than {request.num_workers} to go on from them."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _stem(parts: Path, index: int) -> Path:
    return parts / f"shard-{index:06d}"


def _check_results(request: PrepareRequest, results: list[ShardResult]) -> None:
    num_bad = sum(result.num_bad_records for result in results)
    if num_bad > request.max_bad_records:
        shown = [text for result in results for text in result.bad_records][:_BAD_RECORDS_SHOWN]
        more = f"\n  and {num_bad - len(shown):,} more" if num_bad > len(shown) else ""
        raise DataError(
            f"{num_bad:,} bad records, --max-bad-records allows {request.max_bad_records:,}; nothing was "
            f"written:\n"
            + "\n".join(f"  {text}" for text in shown)
            + more
            + f"\nRepair them, or leave them out with --max-bad-records {num_bad} (finished parts are kept)."
        )
    if not sum(result.num_documents for result in results):
        raise DataError(
            f"the input files hold no document: {', '.join(str(path) for path in request.inputs)}. "
            f"{sum(result.num_empty_documents for result in results):,} records were empty."
        )


def _merge(request: PrepareRequest, plan: _Plan, parts: Path, results: list[ShardResult]) -> Manifest:
    temporary = file_of(request.output, ".tmp")
    temporary_bin, temporary_idx = file_of(temporary, ".bin"), file_of(temporary, ".idx")
    final_bin, final_idx = file_of(request.output, ".bin"), file_of(request.output, ".idx")
    try:
        with full_disk_is_a_data_error(final_bin):
            _write_indexed(temporary, plan, parts, results)
            _check_indexed(temporary, plan, results)
            manifest = Manifest(
                tokenizer_sha256=plan.tokenizer.sha256,
                vocab_size=plan.tokenizer.vocab_size,
                eod_id=plan.tokenizer.eod_id,
                dtype=plan.dtype,
                num_documents=sum(result.num_documents for result in results),
                num_tokens=sum(result.num_tokens for result in results),
                text_num_bytes=sum(result.text_num_bytes for result in results),
                num_empty_documents=sum(result.num_empty_documents for result in results),
                num_bad_records=sum(result.num_bad_records for result in results),
                bad_records=[text for result in results for text in result.bad_records][:BAD_RECORDS_KEPT],
                input_files=plan.files,
                bin_file=dataclasses.replace(FileRecord.of(temporary_bin), path=final_bin.name),
                idx_file=dataclasses.replace(FileRecord.of(temporary_idx), path=final_idx.name),
            )
            # Without its .json a set counts as not prepared, so that a crash between the renames is seen.
            file_of(request.output, ".json").unlink(missing_ok=True)
            temporary_bin.replace(final_bin)
            temporary_idx.replace(final_idx)
            sync_folder(final_bin.parent)
            manifest.write(file_of(request.output, ".json"))
    finally:
        temporary_bin.unlink(missing_ok=True)
        temporary_idx.unlink(missing_ok=True)
    return manifest


def _write_indexed(temporary: Path, plan: _Plan, parts: Path, results: list[ShardResult]) -> None:
    bin_path = file_of(temporary, ".bin")
    builder = IndexedDatasetBuilder(str(bin_path), dtype=np.dtype(plan.dtype).type)
    try:
        for index, result in enumerate(results):
            if not result.num_documents:
                continue
            ids = np.memmap(str(_stem(parts, index)) + ".bin", dtype=plan.dtype, mode="r")
            lengths = np.fromfile(str(_stem(parts, index)) + ".len", dtype=np.int32)
            ends = np.cumsum(lengths, dtype=np.int64)
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
                builder.add_document(ids[end - length : end], [length])
        builder.finalize(str(file_of(temporary, ".idx")))
    finally:
        # finalize closes it; after an error this releases the handle, and a full disk shows again.
        builder.data_file.close()
    for path in (bin_path, file_of(temporary, ".idx")):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _check_indexed(temporary: Path, plan: _Plan, results: list[ShardResult]) -> None:
    """Read back what was written: counts, sizes, and an end-of-document id at the end of each document."""
    written = IndexedDataset(str(temporary))
    lengths = np.asarray(written.sequence_lengths, dtype=np.int64)
    num_tokens = sum(result.num_tokens for result in results)
    size = file_of(temporary, ".bin").stat().st_size
    ids = np.memmap(file_of(temporary, ".bin"), dtype=plan.dtype, mode="r")
    intact = (
        len(written) == sum(result.num_documents for result in results)
        and int(lengths.sum()) == num_tokens
        and size == num_tokens * np.dtype(plan.dtype).itemsize
        and bool((ids[np.cumsum(lengths) - 1] == plan.tokenizer.eod_id).all())
    )
    del written, ids
    if not intact:
        raise DataError(
            f"{temporary}.bin and .idx do not hold what was written to them; the disk or memory is faulty. "
            f"Nothing was left under the final name. Run the same command again."
        )
