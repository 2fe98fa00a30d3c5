"""Documents to one shard of tokens, here or in worker processes.

Workers are plain interpreters that are told their jobs as lines of JSON. Neither fork (the parent has torch's threads)
nor multiprocessing's spawn (it runs the user's script again) would serve everyone who calls ``prepare_data``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from memtx import files
from memtx.data.document import Document
from memtx.data.pieces import WordCounter
from memtx.data.tokenizers import Tokenizer, tokenizer_from_json
from memtx.errors import DataError, MemtxError

Job = tuple[Path, Sequence[Document]]
Advance = Callable[[int], None]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored ids: little-endian uint16 where the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_shard(path: Path, documents: Sequence[Document], tokenizer: Tokenizer, advance: Advance) -> None:
    """Write the tokens of documents, each after ``begin``, to ``path`` and a record of them to ``path``.json.

    Both are whole or absent, the record last: where it is, the shard is whole.

    Args:
        path: the shard's file.
        documents: what it holds, in this order.
        tokenizer: gives the ids.
        advance: called with the number of bytes of text read since the last call.

    Raises:
        DataError: a text is not UTF-8 or has no word; names its document.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    digest, offset = hashlib.sha256(), 0
    records: list[dict[str, Any]] = []
    with files.atomic_open(path) as handle:
        for document in documents:
            counter = WordCounter()
            length = 0
            for ids in _tokens(document, tokenizer, counter, advance):
                raw = np.asarray(ids).astype(dtype).tobytes()
                handle.write(raw)
                digest.update(raw)
                length += len(ids)
            if counter.words == 0:
                raise DataError(
                    f"'{document.path or document.id}' has no words, expected a text.",
                    "Remove it or restore its text.",
                )
            facts = {"id": document.id, "title": document.title, "offset": offset, "length": length}
            records.append({**facts, "words": counter.words, "bytes": counter.bytes})
            offset += length
    size = offset * dtype.itemsize
    record = {"file": path.name, "size": size, "sha256": digest.hexdigest(), "documents": records}
    files.write_text(record_path(path), json.dumps(record))


def record_path(shard: Path) -> Path:
    """Return where a shard's record is."""
    return shard.with_name(shard.name + ".json")


def _tokens(document: Document, tokenizer: Tokenizer, counter: WordCounter, advance: Advance) -> Iterator[Any]:
    def counted() -> Iterator[str]:
        for chunk in document.chunks():
            before = counter.bytes
            counter.add(chunk)
            yield chunk
            advance(counter.bytes - before)

    yield np.array([tokenizer.begin])
    yield from tokenizer.encode_stream(counted())


def write_shards(jobs: Sequence[Job], tokenizer: Tokenizer, workers: int, advance: Advance) -> None:
    """Write shards, ``workers`` at a time; an interrupt leaves those that are whole.

    Args:
        jobs: path and documents of each.
        tokenizer: gives the ids; a kind from outside memtx is used in this process only.
        workers: processes; 1 for this one.
        advance: called with bytes of text read, from any thread.

    Raises:
        DataError: as :func:`write_shard`; the first one met ends the others.
    """
    workers = min(workers, len(jobs))
    if workers <= 1 or not type(tokenizer).__module__.startswith("memtx."):
        for path, documents in jobs:
            write_shard(path, documents, tokenizer, advance)
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
                path, documents = todo.get_nowait()
            except queue.Empty:
                return
            job = {"path": str(path), "documents": [dataclasses.asdict(document) for document in documents]}
            process.stdin.write(json.dumps(job) + "\n")
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
        job = json.loads(line)
        documents = [Document(**facts) for facts in job["documents"]]
        try:
            write_shard(Path(job["path"]), documents, tokenizer, lambda count: tell(advance=count))
        except MemtxError as error:
            tell(error=[error.what, error.cure])
        else:
            tell(done=True)


if __name__ == "__main__":
    # Ctrl-C reaches the whole process group; the parent decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(sys.stdin, sys.stdout)
