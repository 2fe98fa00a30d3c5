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
from memtx.data.document import Document, Part
from memtx.data.pieces import WordCounter
from memtx.data.source import dealt
from memtx.data.tokenizers import Tokenizer, tokenizer_from_json
from memtx.errors import DataError, MemtxError

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process does without another's help: some parts, to one shard in each split.

    Attributes:
        folder: holds a folder a split.
        number: of the shards.
        parts: read in this order.
        shares: what each split gets of the documents.
        tokenizer: the tokenizer's fingerprint.
    """

    folder: Path
    number: int
    parts: Sequence[Part]
    shares: Mapping[str, float]
    tokenizer: str

    def shard(self, split: str) -> Path:
        """Return where the job's shard of a split is."""
        return self.folder / split / f"shard-{self.number:05d}.bin"

    @property
    def stamp(self) -> str:
        """SHA-256 of what the shards are made of."""
        digest = hashlib.sha256(f"{self.tokenizer}\n{json.dumps(dict(self.shares))}\n".encode())
        for part in self.parts:
            digest.update(part.stamp.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()

    @property
    def done(self) -> bool:
        """Whether all its shards are there, whole, undamaged, and made of what the parts are now."""
        try:
            for split in self.shares:
                path = self.shard(split)
                record = files.read_json(record_path(path))
                if record["made_of"] != self.stamp:
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


def record_path(shard: Path) -> Path:
    """Return where a shard's record is."""
    return shard.with_name(shard.name + ".json")


class _Shard:
    """A shard that grows: its file is made with the first document, so that a split without any has none."""

    def __init__(self, path: Path, dtype: np.dtype[Any], stack: contextlib.ExitStack) -> None:
        self.path, self._dtype, self._stack = path, dtype, stack
        self._handle: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self.left_out = 0
        self.ids: list[str] = []
        self.titles: list[str] = []
        # Machine numbers: a shard of short documents has a million of each.
        self.lengths, self.words, self.bytes = array("q"), array("q"), array("q")

    def write(self, document: Document, tokenizer: Tokenizer, advance: Advance) -> None:
        """Append a document's tokens after ``begin``."""
        if document.row and not document.text.strip():
            self.left_out += 1
            return
        if self._handle is None:
            self._handle = self._stack.enter_context(files.atomic_open(self.path))
        counter, length = WordCounter(), 0
        for ids in _tokens(document, tokenizer, counter, advance):
            raw = np.asarray(ids).astype(self._dtype).tobytes()
            self._handle.write(raw)
            self._digest.update(raw)
            length += len(ids)
        if counter.words == 0:
            raise DataError(
                f"'{document.path or document.id}' has no words, expected a text.", "Remove it or restore its text."
            )
        self.ids.append(document.id)
        self.titles.append(document.title)
        for column, value in ((self.lengths, length), (self.words, counter.words), (self.bytes, counter.bytes)):
            column.append(value)

    def record(self, stamp: str) -> dict[str, Any]:
        """Return what is to be known of it; columns by document."""
        return {
            "file": self.path.name,
            "size": sum(self.lengths) * self._dtype.itemsize,
            "sha256": self._digest.hexdigest(),
            "made_of": stamp,
            "ids": self.ids,
            "left_out": self.left_out,
            "titles": self.titles if self.titles != self.ids else None,
            **{name: getattr(self, name).tolist() for name in ("lengths", "words", "bytes")},
        }


def write_job(job: Job, tokenizer: Tokenizer, advance: Advance) -> None:
    """Write a job's shards, and beside each a record of its documents.

    All are whole or absent, the records last: where they are, so are the shards.

    Args:
        job: what to read and where to write.
        tokenizer: gives the ids.
        advance: called with the bytes of the source read since the last call; a part's add up to its size.

    Raises:
        DataError: a text is not UTF-8 or has no word; names its document.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        shards = {split: _Shard(job.shard(split), dtype, stack) for split in job.shares}
        for part in job.parts:
            with _counted(part.size, advance) as seen:
                for document in part.documents():
                    shards[dealt(document.id, job.shares)].write(document, tokenizer, seen)
    for shard in shards.values():
        files.write_text(record_path(shard.path), json.dumps(shard.record(job.stamp)))


@contextlib.contextmanager
def _counted(size: int, advance: Advance) -> Iterator[Advance]:
    """Yield what to tell of text read: passed on up to ``size``, the rest of it at the end.

    A text may be larger than what it was read from, which is compressed, or smaller, where there is more in a file.
    """
    left = size

    def told(count: int) -> None:
        nonlocal left
        count = min(count, left)
        left -= count
        if count:
            advance(count)

    yield told
    told(left)


def _tokens(document: Document, tokenizer: Tokenizer, counter: WordCounter, advance: Advance) -> Iterator[Any]:
    def counted() -> Iterator[str]:
        for chunk in document.chunks():
            before = counter.bytes
            counter.add(chunk)
            yield chunk
            advance(counter.bytes - before)

    yield np.array([tokenizer.begin])
    yield from tokenizer.encode_stream(counted())


def write_jobs(jobs: Sequence[Job], tokenizer: Tokenizer, workers: int, advance: Advance) -> None:
    """Do jobs, ``workers`` at a time; an interrupt leaves the shards of those that are done.

    Args:
        jobs: none depends on another.
        tokenizer: gives the ids; a kind from outside memtx is used in this process only.
        workers: processes; 1 for this one.
        advance: called with bytes of the source read, from any thread.

    Raises:
        DataError: as :func:`write_job`; the first one met ends the others.
    """
    workers = min(workers, len(jobs))
    alone = not type(tokenizer).__module__.startswith("memtx.") or any(part.here for job in jobs for part in job.parts)
    if workers <= 1 or alone:
        for job in jobs:
            write_job(job, tokenizer, advance)
        return
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    processes = [_start() for _ in range(workers)]
    stopped = threading.Event()
    try:
        with ThreadPoolExecutor(workers) as pool:
            text = tokenizer.to_json()
            futures = [pool.submit(_drive, process, text, todo, advance, stopped) for process in processes]
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


def _start() -> subprocess.Popen[str]:
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
        [sys.executable, "-P", "-m", "memtx.data.encoding"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )


def _drive(
    process: subprocess.Popen[str],
    tokenizer: str,
    todo: queue.SimpleQueue[Job],
    advance: Advance,
    stopped: threading.Event,
) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(tokenizer) + "\n")
        while not stopped.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            process.stdin.write(_told(job) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise DataError(*answer["error"])
                if "done" in answer:
                    break
                advance(answer["advance"])
            else:
                raise BrokenPipeError
    except OSError as error:
        if not stopped.is_set():
            raise DataError(
                f"A worker that encodes text ended with code {process.wait()}.",
                "Was it out of memory? Try again with fewer workers; what is done is kept.",
            ) from error


def _serve(source: IO[str], sink: IO[str]) -> None:
    """A worker's life: the tokenizer on the first line, a job on each further one."""

    def tell(**answer: Any) -> None:
        sink.write(json.dumps(answer) + "\n")
        sink.flush()

    tokenizer = tokenizer_from_json(json.loads(source.readline()))
    for line in source:
        try:
            write_job(_heard(line), tokenizer, lambda count: tell(advance=count))
        except MemtxError as error:
            tell(error=[error.what, error.cure])
        except MemoryError:
            tell(error=["A worker that encodes text is out of memory.", "Try again with fewer workers."])
        else:
            tell(done=True)


def _told(job: Job) -> str:
    """Return a job as a line of JSON."""
    parts = [[type(part).__module__, type(part).__qualname__, vars(part)] for part in job.parts]
    return json.dumps([str(job.folder), job.number, parts, dict(job.shares), job.tokenizer])


def _heard(line: str) -> Job:
    """Return the job that :func:`_told` wrote down."""
    folder, number, parts, shares, tokenizer = json.loads(line)
    made = [getattr(importlib.import_module(module), name)(**facts) for module, name, facts in parts]
    return Job(Path(folder), number, made, shares, tokenizer)


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the parent decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(sys.stdin, sys.stdout)
    except BrokenPipeError:
        # The parent was killed; what is not whole will be made again. Leaving as usual would flush the pipe once more.
        os._exit(1)
