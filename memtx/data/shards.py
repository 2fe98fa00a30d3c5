"""Tokens on disk: encoded once, read through memory maps, known by the fingerprint of text and tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.document import Document
from memtx.data.encoding import Advance, Job, record_path, token_dtype, write_shards
from memtx.data.tokenizers import Ids, Tokenizer
from memtx.errors import DataError, MemtxError

FORMAT_VERSION = 1
SHARD_BYTES = 64 << 20
"""Text bytes of a shard, so at most as many tokens; one longer document is a shard of its own."""
LEAST_BYTES = 1 << 20
"""Text bytes below which a shard is not worth a process."""

log = logging.getLogger(__name__)


class TokenStore:
    """The tokens of one split, memory-mapped: document i is ``[begin, text tokens...]``.

    Args:
        folder: what :func:`open_store` wrote.

    Attributes:
        ids: name of each document.
        titles: title of each document.
        lengths: (documents,) int64, tokens of each document with ``begin``.
        words: (documents,) int64, whitespace-separated words of each document's text.
        bytes: (documents,) int64, UTF-8 bytes of each document's text.
        begin: the id that begins a document.
        vocab_size: ids are below it.
        fingerprint: SHA-256 over the tokens themselves and the tokenizer: equal only for equal data.

    Raises:
        DataError: the folder holds no store, one of another version, or a shard is missing or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.begin: int = index["begin"]
        self.vocab_size: int = index["vocab_size"]
        self.source: str = index["source"]
        self.fingerprint: str = index["fingerprint"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._maps: dict[int, NDArray[Any]] = {}
        documents = [(place, one) for place, shard in enumerate(self._shards) for one in shard["documents"]]
        self.ids: list[str] = [one["id"] for _, one in documents]
        self.titles: list[str] = [one["title"] for _, one in documents]
        self.lengths = np.array([one["length"] for _, one in documents], dtype=np.int64)
        self.words = np.array([one["words"] for _, one in documents], dtype=np.int64)
        self.bytes = np.array([one["bytes"] for _, one in documents], dtype=np.int64)
        self._places = [(place, int(one["offset"])) for place, one in documents]
        for shard in self._shards:
            path = self.folder / shard["file"]
            found = path.stat().st_size if path.is_file() else -1
            if found != shard["size"]:
                raise DataError(
                    f"The token shard '{path}' has {max(found, 0)} bytes, expected {shard['size']}.",
                    "Prepare the data again; whole shards are kept.",
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the tokens themselves.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all documents, ``begin`` included."""
        return int(self.lengths.sum())

    def document(self, index: int) -> Ids:
        """Return all tokens of a document, (length,) uint16 or uint32, a read-only view of the map."""
        return self.slice(index, 0, int(self.lengths[index]))

    def slice(self, index: int, start: int, stop: int) -> Ids:
        """Return tokens ``start`` to ``stop`` (at most its length) of a document, (stop - start,), a read-only view."""
        shard, offset = self._places[index]
        if shard not in self._maps:
            path = self.folder / self._shards[shard]["file"]
            self._maps[shard] = np.memmap(path, dtype=token_dtype(self.vocab_size), mode="r")
        stop = min(stop, int(self.lengths[index]))
        return self._maps[shard][offset + start : offset + stop]

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the index.

        Raises:
            DataError: a shard is damaged; names it.
        """
        for shard in self._shards:
            path = self.folder / shard["file"]
            if files.checksum(path) != shard["sha256"]:
                raise DataError(f"The token shard '{path}' is damaged.", "Prepare the data again.")


def _read_index(folder: Path) -> dict[str, Any]:
    cure = "Prepare the data again."
    try:
        index = files.read_json(folder / "index.json")
        version = index["version"]
        if version == FORMAT_VERSION:
            _ = index["begin"], index["vocab_size"], index["source"], index["fingerprint"], index["shards"]
    except DataError:
        raise
    except (MemtxError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}' holds no whole token store ({error}).", cure) from error
    if version != FORMAT_VERSION:
        raise DataError(f"'{folder}' has format version {version}, this release reads {FORMAT_VERSION}.", cure)
    assert isinstance(index, dict)
    return index


def source_fingerprint(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of what a store is made of: each document's stamp, the tokenizer, the format."""
    digest = hashlib.sha256(f"{FORMAT_VERSION}\n{tokenizer.fingerprint}\n".encode())
    for document in documents:
        digest.update(document.stamp.encode() + b"\n")
    return digest.hexdigest()


def default_cache() -> Path:
    """Return ``~/.cache/memtx``, where stores and trained tokenizers go unless another folder is given."""
    return Path("~/.cache/memtx").expanduser()


def open_store(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    cache: str | os.PathLike[str] | None = None,
    name: str = "tokens",
    workers: int | None = None,
    verify: bool = False,
) -> TokenStore:
    """Open the tokens of documents, encoding them first where that was not done yet.

    A store is found again by the names, sizes and times of the files (the hash of embedded texts) and the tokenizer, so
    changed text or another tokenizer is another store. It appears under its name when it is whole; an interrupted run
    goes on with the shards it had finished, a damaged store keeps its good ones.

    Args:
        documents: at least one.
        tokenizer: gives the ids; must be fitted.
        cache: folder of all stores; None for ``~/.cache/memtx``.
        name: what the store's folder name begins with, such as the split.
        workers: processes; None for one a core.
        verify: compare every shard's checksum, not its size only.

    Raises:
        DataError: a text is not UTF-8 or empty.
        MemtxError: the cache cannot be written to.
    """
    if not documents:
        raise DataError("There are no documents to encode, expected at least one.", "Check the source of texts.")
    source = source_fingerprint(documents, tokenizer)
    folder = (Path(cache).expanduser() if cache is not None else default_cache()) / f"{name}-{source[:16]}"
    with locked(folder):
        if folder.exists():
            try:
                store = TokenStore(folder)
                if verify:
                    store.verify()
            except DataError as error:
                log.warning("%s Encoding it again.", error.what)
            else:
                if store.source == source:
                    return store
        _build(folder, source, documents, tokenizer, workers or os.cpu_count() or 1)
    return TokenStore(folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; the empty lock file beside it stays, the lock ends with its process.

    Raises:
        MemtxError: the folder of ``path`` cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path.with_name(f".{path.name}.lock"), "ab")  # noqa: SIM115
    except OSError as error:
        raise MemtxError(
            f"The cache '{path.parent}' cannot be written to: {error.strerror}.",
            "Give a folder of your own with --data.cache PATH.",
        ) from error
    with handle:
        try:
            import fcntl
        except ImportError:  # Windows: a second process repeats the work, renames decide
            yield
        else:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def plan_shards(sizes: Sequence[int]) -> list[range]:
    """Return which documents each shard holds: about 32 shards, each of 1 to 64 MB of text, in order.

    A function of the sizes alone, so that an interrupted run finds its shards again whatever its workers.
    """
    target = min(SHARD_BYTES, max(LEAST_BYTES, sum(sizes) // 32))
    shards: list[range] = []
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > target:
            shards.append(range(start, place))
            start, held = place, 0
        held += size
    return [*shards, range(start, len(sizes))]


def _build(folder: Path, source: str, documents: Sequence[Document], tokenizer: Tokenizer, workers: int) -> None:
    building = folder.with_name(f".{folder.name}.building")
    if folder.exists():
        shutil.rmtree(building, ignore_errors=True)
        os.replace(folder, building)
        (building / "index.json").unlink(missing_ok=True)
    building.mkdir(parents=True, exist_ok=True)
    for left in building.glob(".*.tmp"):  # of a run that was killed
        left.unlink()
    plan = plan_shards([document.size for document in documents])
    paths = [building / f"shard-{number:05d}.bin" for number in range(len(plan))]
    jobs: list[Job] = []
    done = 0
    for path, places in zip(paths, plan, strict=True):
        if _whole(path):
            done += sum(documents[place].size for place in places)
        else:
            jobs.append((path, [documents[place] for place in places]))
    with _progress(f"Encoding {folder.name.rsplit('-', 1)[0]}", sum(one.size for one in documents), done) as advance:
        write_shards(jobs, tokenizer, workers, advance)
    shards = [files.read_json(record_path(path)) for path in paths]
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for shard in shards:
        digest.update(shard["sha256"].encode())
        digest.update(str([(one["id"], one["length"]) for one in shard["documents"]]).encode())
    index = {
        "version": FORMAT_VERSION,
        "source": source,
        "fingerprint": digest.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "begin": tokenizer.begin,
        "vocab_size": tokenizer.vocab_size,
        "shards": shards,
    }
    files.write_json(building / "index.json", index)
    os.replace(building, folder)
    files.sync_folder(folder.parent)


def _whole(path: Path) -> bool:
    """Whether a shard of an earlier run is there and undamaged."""
    try:
        record = files.read_json(record_path(path))
        return bool(path.stat().st_size == record["size"] and files.checksum(path) == record["sha256"])
    except (MemtxError, OSError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _progress(description: str, total: int, done: int) -> Iterator[Advance]:
    """Show bytes, rate and time left on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
