"""Parts of a source to shards of tokens, here or in worker processes.

Workers are plain interpreters that are told their jobs as lines of JSON. Neither fork (the parent has torch's threads)
nor multiprocessing's spawn (it runs the user's script again) would serve everyone who calls ``prepare_data``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from memtx import files
from memtx.data.sources.document import Document, SourcePart
from memtx.data.sources.manifest import assign_split
from memtx.data.text_chunks import WordCounter
from memtx.data.tokenizers import Tokenizer, tokenizer_from_json
from memtx.errors import DataError, MemtxError

ProgressCallback = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """What one process does without another's help: some parts, to one shard in each split.

    Attributes:
        folder: holds a folder a split.
        shard_index: of the shards.
        parts: read in this order.
        split_fractions: what each split gets of the documents.
        tokenizer_fingerprint: the tokenizer's fingerprint.
    """

    folder: Path
    shard_index: int
    parts: Sequence[SourcePart]
    split_fractions: Mapping[str, float]
    tokenizer_fingerprint: str

    def shard_path(self, split: str) -> Path:
        """Return where the job's shard of a split is."""
        return self.folder / split / f"shard-{self.shard_index:05d}.bin"

    @property
    def input_fingerprint(self) -> str:
        """SHA-256 of what the shards are made of."""
        digest = hashlib.sha256(f"{self.tokenizer_fingerprint}\n{json.dumps(dict(self.split_fractions))}\n".encode())
        for part in self.parts:
            digest.update(part.cache_key.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()

    @property
    def is_complete(self) -> bool:
        """Whether all its shards are there, whole, undamaged, and made of what the parts are now."""
        try:
            for split in self.split_fractions:
                path = self.shard_path(split)
                record = files.read_json(metadata_path(path))
                if record["input_fingerprint"] != self.input_fingerprint:
                    return False
                if record["size"] and (
                    path.stat().st_size != record["size"] or files.checksum(path) != record["sha256"]
                ):
                    return False
        except (MemtxError, OSError, KeyError, TypeError):
            return False
        return True


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored ids: little-endian uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def metadata_path(shard: Path) -> Path:
    """Return where a shard's record is."""
    return shard.with_name(shard.name + ".json")


class _ShardWriter:
    """A shard that grows: its file is made with the first document, so that a split without any has none."""

    def __init__(self, path: Path, dtype: np.dtype[Any], stack: contextlib.ExitStack) -> None:
        self.path, self._dtype, self._stack = path, dtype, stack
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self.num_skipped = 0
        self.ids: list[str] = []
        self.titles: list[str] = []
        # Machine numbers: a shard of short documents has a million of each.
        self.lengths, self.words, self.bytes = array("q"), array("q"), array("q")

    def write_document(self, document: Document, tokenizer: Tokenizer, on_progress: ProgressCallback) -> None:
        """Append a document's tokens after ``bos_token_id``."""
        if document.is_table_row and not document.text.strip():
            self.num_skipped += 1
            return
        if self._file is None:
            self._file = self._stack.enter_context(files.atomic_open(self.path))
        counter, length = WordCounter(), 0
        for ids in _encode_document(document, tokenizer, counter, on_progress):
            raw = np.asarray(ids).astype(self._dtype).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            length += len(ids)
        if counter.num_words == 0:
            raise DataError(
                f"'{document.path or document.id}' has no words, expected a text.", "Remove it or restore its text."
            )
        self.ids.append(document.id)
        self.titles.append(document.title)
        for column, value in ((self.lengths, length), (self.words, counter.num_words), (self.bytes, counter.num_bytes)):
            column.append(value)

    def metadata(self, input_fingerprint: str) -> dict[str, Any]:
        """Return what is to be known of it; columns by document."""
        return {
            "file": self.path.name,
            "size": sum(self.lengths) * self._dtype.itemsize,
            "sha256": self._digest.hexdigest(),
            "input_fingerprint": input_fingerprint,
            "ids": self.ids,
            "num_skipped": self.num_skipped,
            "titles": self.titles if self.titles != self.ids else None,
            **{name: getattr(self, name).tolist() for name in ("lengths", "words", "bytes")},
        }


def write_job(job: ShardJob, tokenizer: Tokenizer, on_progress: ProgressCallback) -> None:
    """Write a job's shards, and beside each a record of its documents.

    All are whole or absent, the records last: where they are, so are the shards.

    Args:
        job: what to read and where to write.
        tokenizer: gives the ids.
        on_progress: called with the bytes of the source read since the last call; a part's add up to its size.

    Raises:
        DataError: a text is not UTF-8 or has no word; names its document.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        shards = {split: _ShardWriter(job.shard_path(split), dtype, stack) for split in job.split_fractions}
        for part in job.parts:
            with _capped_progress(part.size, on_progress) as seen:
                for document in part.iter_documents():
                    shards[assign_split(document.id, job.split_fractions)].write_document(document, tokenizer, seen)
    for shard in shards.values():
        files.write_text(metadata_path(shard.path), json.dumps(shard.metadata(job.input_fingerprint)))


@contextlib.contextmanager
def _capped_progress(size: int, on_progress: ProgressCallback) -> Iterator[ProgressCallback]:
    """Yield what to tell of text read: passed on up to ``size``, the rest of it at the end.

    A text may be larger than what it was read from, which is compressed, or smaller, where there is more in a file.
    """
    left = size

    def told(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        if count:
            on_progress(count)

    yield told
    told(left)


def _encode_document(
    document: Document, tokenizer: Tokenizer, counter: WordCounter, on_progress: ProgressCallback
) -> Iterator[Any]:
    def counted() -> Iterator[str]:
        for chunk in document.iter_text():
            before = counter.num_bytes
            counter.update(chunk)
            yield chunk
            on_progress(counter.num_bytes - before)

    yield np.array([tokenizer.bos_token_id])
    yield from tokenizer.encode_stream(counted())


def write_jobs(jobs: Sequence[ShardJob], tokenizer: Tokenizer, num_workers: int, on_progress: ProgressCallback) -> None:
    """Do jobs, ``num_workers`` at a time; an interrupt leaves the shards of those that are done.

    Args:
        jobs: none depends on another.
        tokenizer: gives the ids; a kind from outside memtx is used in this process only.
        num_workers: processes; 1 for this one.
        on_progress: called with bytes of the source read, from any thread.

    Raises:
        DataError: as :func:`write_job`; the first one met ends the others.
    """
    num_workers = min(num_workers, len(jobs))
    alone = not type(tokenizer).__module__.startswith("memtx.") or any(
        part.is_process_local for job in jobs for part in job.parts
    )
    if num_workers <= 1 or alone:
        for job in jobs:
            write_job(job, tokenizer, on_progress)
        return
    todo: queue.SimpleQueue[ShardJob] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    processes = [_start_worker() for _ in range(num_workers)]
    stopped = threading.Event()
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            text = tokenizer.to_json()
            futures = [pool.submit(_feed_worker, process, text, todo, on_progress, stopped) for process in processes]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                stopped.set()
                for process in processes:
                    process.kill()
                raise
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _start_worker() -> subprocess.Popen[str]:
    # The parent's path, so that a checkout which is not installed is found; one thread each, the shards are parallel.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8",
        # Hugging Face's `datasets` would import torch only to know of it: 5 s and 200 MB a process.
        "USE_TORCH": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "memtx.data.tokenize"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )


def _feed_worker(
    process: subprocess.Popen[str],
    tokenizer_json: str,
    jobs: queue.SimpleQueue[ShardJob],
    on_progress: ProgressCallback,
    stop_event: threading.Event,
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(tokenizer_json) + "\n")
        while not stop_event.is_set():
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                return
            process.stdin.write(_job_to_json(job) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise DataError(*answer["error"])
                if "done" in answer:
                    break
                on_progress(answer["advance"])
            else:
                raise BrokenPipeError
    except OSError as error:
        if not stop_event.is_set():
            raise DataError(
                f"A worker that encodes text ended with code {process.wait()}.",
                "Was it out of memory? Try again with fewer workers; what is done is kept.",
            ) from error


def _run_worker(input_stream: IO[str], output_stream: IO[str]) -> None:
    """A worker's life: the tokenizer on the first line, a job on each further one."""

    def send(**answer: Any) -> None:
        output_stream.write(json.dumps(answer) + "\n")
        output_stream.flush()

    tokenizer = tokenizer_from_json(json.loads(input_stream.readline()))
    for line in input_stream:
        try:
            write_job(_job_from_json(line), tokenizer, lambda count: send(advance=count))
        except MemtxError as error:
            send(error=[error.message, error.hint])
        except MemoryError:
            send(error=["A worker that encodes text is out of memory.", "Try again with fewer workers."])
        else:
            send(done=True)


def _job_to_json(job: ShardJob) -> str:
    """Return a job as a line of JSON."""
    parts = [[type(part).__module__, type(part).__qualname__, vars(part)] for part in job.parts]
    return json.dumps([str(job.folder), job.shard_index, parts, dict(job.split_fractions), job.tokenizer_fingerprint])


def _job_from_json(line: str) -> ShardJob:
    """Return the job that :func:`_job_to_json` wrote down."""
    folder, number, parts, shares, tokenizer = json.loads(line)
    made = [getattr(importlib.import_module(module), name)(**facts) for module, name, facts in parts]
    return ShardJob(Path(folder), number, made, shares, tokenizer)


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the parent decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _run_worker(sys.stdin, sys.stdout)
    except BrokenPipeError:
        # The parent was killed; what is not whole will be made again. Leaving as usual would flush the pipe once more.
        os._exit(1)
