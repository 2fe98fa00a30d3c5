"""Tokenization of the parts of a source into shards, in this process or in workers.

A worker is a plain interpreter that receives pickled jobs over a pipe. ProcessPoolExecutor would not do: fork copies
PyTorch's threads, spawn and forkserver run the user's script again with all that it imports, and its workers outlive a
killed parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from memtx.data.shards import ProgressCallback, ShardWriter, is_complete_shard
from memtx.data.sources.base import CorpusManifest, SourcePart, assign_split
from memtx.data.tokenizers import Tokenizer
from memtx.errors import DataError, MemtxError

MAX_SHARD_BYTES = 64 << 20  # of text, so at most as many tokens; one longer document is a shard of its own
MIN_SHARD_BYTES = 1 << 20  # of text; a smaller shard is not worth a job


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """Work of one process: parts of a source, read in this order, written to one shard in each split."""

    folder: Path  # of the splits' folders
    shard_index: int
    parts: Sequence[SourcePart]
    split_fractions: Mapping[str, float]  # of the documents
    tokenizer_fingerprint: str

    def shard_path(self, split: str) -> Path:
        """Return the path of the job's shard of a split."""
        return self.folder / split / f"shard-{self.shard_index:05d}.bin"

    @property
    def input_fingerprint(self) -> str:
        """SHA-256 of what the shards are made of."""
        split_fractions = json.dumps(dict(self.split_fractions))
        return hash_lines(self.tokenizer_fingerprint, split_fractions, *(part.cache_key for part in self.parts))

    @property
    def is_complete(self) -> bool:
        """True if all its shards are undamaged and made of the parts as they are now."""
        fingerprint = self.input_fingerprint
        return all(is_complete_shard(self.shard_path(split), fingerprint) for split in self.split_fractions)


def hash_lines(*lines: str) -> str:
    """Return the SHA-256 of lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def plan_shards(sizes: Sequence[int]) -> list[range]:
    """Return the indices of the parts of each shard: about 32 shards, each of 1 to 64 MB of text, in order.

    A function of the sizes alone, so that an interrupted run finds its shards again with any number of workers.
    """
    target = min(MAX_SHARD_BYTES, max(MIN_SHARD_BYTES, sum(sizes) // 32))
    shards: list[range] = []
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > target:
            shards.append(range(start, index))
            start, total = index, 0
        total += size
    return [*shards, range(start, len(sizes))]


def plan_jobs(folder: Path, manifest: CorpusManifest, tokenizer: Tokenizer) -> list[ShardJob]:
    """Return the jobs that tokenize a source, complete or not."""
    jobs: list[ShardJob] = []

    def add_jobs(parts: Sequence[SourcePart], split_fractions: Mapping[str, float], first_index: int) -> None:
        for shard_index, indices in enumerate(plan_shards([part.size for part in parts]), first_index):
            shard_parts = [parts[index] for index in indices]
            jobs.append(ShardJob(folder, shard_index, shard_parts, split_fractions, tokenizer.fingerprint))

    for split, parts in manifest.split_parts.items():
        if parts:
            add_jobs(parts, {split: 1.0}, 0)
    if manifest.unsplit_parts:
        # Indices that no split uses yet.
        add_jobs(manifest.unsplit_parts, manifest.split_fractions, len(jobs))
    return jobs


def write_job(job: ShardJob, tokenizer: Tokenizer, on_progress: ProgressCallback) -> None:
    """Write the shards of a job, each atomically, and then their metadata.

    ``on_progress`` gets the bytes of each part, which add up to its size. Raises DataError with the name of a document
    that is not UTF-8 or has no words.
    """
    with contextlib.ExitStack() as stack:
        shards = {split: ShardWriter(job.shard_path(split), tokenizer, stack) for split in job.split_fractions}
        for part in job.parts:
            with _capped_progress(part.size, on_progress) as on_part_progress:
                for document in part.iter_documents():
                    shards[assign_split(document.id, job.split_fractions)].write_document(document, on_part_progress)
    for shard in shards.values():
        shard.write_metadata(job.input_fingerprint)


@contextlib.contextmanager
def _capped_progress(size: int, on_progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Yield a callback that reports text up to ``size`` bytes; report the rest at the end.

    A text may be larger than its source, which is compressed, or smaller, where a file holds more than text.
    """
    remaining = size

    def report(count: int) -> None:
        nonlocal remaining
        count = min(count, remaining)
        remaining -= count
        if count:
            on_progress(count)

    yield report
    report(remaining)


def needs_this_process(jobs: Sequence[ShardJob], tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer or a part of a source cannot be sent to another process."""
    is_foreign = not type(tokenizer).__module__.startswith("memtx.")
    return is_foreign or any(part.is_process_local for job in jobs for part in job.parts)


def write_jobs(jobs: Sequence[ShardJob], tokenizer: Tokenizer, num_workers: int, on_progress: ProgressCallback) -> None:
    """Do independent jobs in ``num_workers`` processes (1: in this one); an interrupt keeps complete shards.

    A tokenizer from outside memtx is used in this process only. ``on_progress`` may be called from any thread. Raises
    DataError if a job fails as in :func:`write_job`, which ends the others.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1 or needs_this_process(jobs, tokenizer):
        for job in jobs:
            write_job(job, tokenizer, on_progress)
        return
    workers = [_Worker(tokenizer) for _ in range(num_workers)]
    idle = list(workers)

    def run(job: ShardJob) -> None:
        worker = idle.pop()
        try:
            worker.run(job, on_progress)
        finally:
            idle.append(worker)

    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()


class _Worker:
    """A process that writes shards."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        environment = {
            **os.environ,
            # The parent's path, so that a checkout that is not installed is found.
            "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            # One thread each; the shards are parallel.
            "TOKENIZERS_PARALLELISM": "false",
            # Else Hugging Face's `datasets` imports PyTorch: 5 s and 200 MB a process.
            "USE_TORCH": "0",
        }
        # Ctrl-C reaches the whole process group, even before the imports; the parent decides when workers end.
        code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        code += "from memtx.data.tokenize import run_worker; run_worker()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._messages: list[Any] = [tokenizer]

    def run(self, job: ShardJob, on_progress: ProgressCallback) -> None:
        """Do one job; raises DataError if it fails or the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            for message in (*self._messages, job):
                pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            self._messages = []
            while (reply := pickle.load(self._process.stdout)) is not None:
                if not isinstance(reply, int):
                    raise DataError(*reply)
                on_progress(reply)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(
                f"A worker that encodes text ended with code {self._process.wait()}.",
                "If it was out of memory, try again with fewer workers; what is done is kept.",
            ) from error

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError), self._process:  # closes the pipes, maybe with unsent bytes of a message
            pass


def run_worker() -> None:
    """Serve as a worker: read the tokenizer and then jobs from stdin, write progress, an error or None to stdout."""

    def send(reply: Any) -> None:
        pickle.dump(reply, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    try:
        tokenizer = pickle.load(sys.stdin.buffer)
        while True:
            job = pickle.load(sys.stdin.buffer)
            try:
                write_job(job, tokenizer, send)
            except MemtxError as error:
                send((error.message, error.hint))
            except MemoryError:
                send(("A worker that encodes text is out of memory.", "Try again with fewer workers."))
            else:
                send(None)
    except (EOFError, pickle.UnpicklingError):
        return  # the parent ended
    except BrokenPipeError:
        # The parent was killed. Exiting as usual would flush the pipe once more; partial shards are made again.
        os._exit(1)
