"""Tokens on disk: a folder of shards, one metadata file beside each, and the index that closes and checks them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.sources.base import Document
from memtx.data.text_chunks import WordCounter
from memtx.data.tokenizers import TokenIds, Tokenizer
from memtx.errors import DataError, MemtxError

FORMAT_VERSION = 3
INDEX_NAME = "index.json"
COUNT_CHUNK_SIZE = 1 << 24  # tokens that are counted at a time
REBUILD_HINT = "Prepare the data again; whole shards are kept."

ProgressCallback = Callable[[int], None]  # called with the bytes of the source read since the last call


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of stored ids: little-endian uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def metadata_path(shard: Path) -> Path:
    """Return the path of a shard's metadata."""
    return shard.with_name(shard.name + ".json")


class ShardWriter:
    """Writes one shard, whose file ``stack`` closes and so makes visible; without documents there is no file."""

    def __init__(self, path: Path, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> None:
        self.path, self._tokenizer, self._stack = path, tokenizer, stack
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._num_skipped = 0
        self._ids: list[str] = []
        self._titles: list[str] = []
        # Compact arrays: a shard of short documents has a million entries in each.
        self._columns = {name: array("q") for name in ("lengths", "words", "bytes")}

    def write_document(self, document: Document, on_progress: ProgressCallback) -> None:
        """Append ``bos_token_id``, if there is one, and the tokens of a document; skip a table row without words.

        Raises DataError if the text is not UTF-8 or has no words.
        """
        if document.is_table_row and not document.text.strip():
            self._num_skipped += 1
            return
        if self._file is None:
            self._file = self._stack.enter_context(files.atomic_open(self.path))
        counter, length = WordCounter(), 0

        def read_text() -> Iterator[str]:
            for text in document.iter_text():
                before = counter.num_bytes
                counter.update(text)
                yield text
                on_progress(counter.num_bytes - before)

        bos = np.array(self._tokenizer.bos_token_ids, dtype=np.int64)
        for ids in itertools.chain([bos], self._tokenizer.encode_stream(read_text())):
            raw = np.asarray(ids).astype(self._dtype).tobytes()
            self._file.write(raw)
            self._digest.update(raw)
            length += len(ids)
        if counter.num_words == 0:
            message = f"'{document.path or document.id}' has no words, expected a text."
            raise DataError(message, "Remove it or restore its text.")
        self._ids.append(document.id)
        self._titles.append(document.title)
        for column, value in zip(self._columns.values(), (length, counter.num_words, counter.num_bytes), strict=True):
            column.append(value)

    def write_metadata(self, input_fingerprint: str) -> None:
        """Write the metadata of a complete shard, with the SHA-256 of what it is made of."""
        metadata = {
            "file": self.path.name,
            "size": sum(self._columns["lengths"]) * self._dtype.itemsize,
            "sha256": self._digest.hexdigest(),
            "input_fingerprint": input_fingerprint,
            "ids": self._ids,
            "num_skipped": self._num_skipped,
            "titles": self._titles if self._titles != self._ids else None,
            **{name: column.tolist() for name, column in self._columns.items()},
        }
        files.write_text(metadata_path(self.path), json.dumps(metadata))


def is_complete_shard(path: Path, input_fingerprint: str) -> bool:
    """Return whether a shard and its metadata are undamaged and made of this input."""
    try:
        metadata = files.read_json(metadata_path(path))
        if metadata["input_fingerprint"] != input_fingerprint:
            return False
        size = metadata["size"]
        return not size or (path.stat().st_size == size and files.checksum(path) == metadata["sha256"])
    except (MemtxError, OSError, KeyError, TypeError):
        return False


class TokenStore:
    """The tokens of one split, memory-mapped: document i is ``[bos_token_id, tokens...]``, or the tokens alone.

    Raises DataError if the folder (which :func:`write_index` closed) holds no store or one of another version, its
    index or metadata is damaged, or a shard is missing or cut short.

    Attributes:
        ids: Id of each document, and ``titles`` its title.
        lengths: ``(documents,)`` int64. Tokens of each document with ``bos_token_id``.
        token_offsets: ``(documents,)`` int64. Tokens of all documents before each.
        num_words: ``(documents,)`` int64. Whitespace-separated words of each text, and ``num_bytes`` its UTF-8 bytes.
        fingerprint: SHA-256 of the tokens and the tokenizer, equal only for equal data.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.bos_token_id: int | None = index["bos_token_id"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        self.fingerprint: str = index["fingerprint"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._memmaps: dict[int, NDArray[Any]] = {}
        self.ids: list[str] = []
        self.titles: list[str] = []
        columns: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "words": [], "bytes": []}
        shard_indices, shard_offsets = [], []
        for shard_index, shard in enumerate(self._shards):
            path = self.folder / shard["file"]
            size = path.stat().st_size if path.is_file() else -1
            if size != shard["size"]:
                message = f"The token shard '{path}' has {max(size, 0)} bytes, expected {shard['size']}."
                raise DataError(message, REBUILD_HINT)
            metadata = _read_metadata(path, shard["metadata_sha256"])
            self.ids += metadata["ids"]
            self.titles += metadata["titles"] or metadata["ids"]
            for name, parts in columns.items():
                parts.append(np.array(metadata[name], dtype=np.int64))
            lengths = columns["lengths"][-1]
            shard_indices.append(np.full(len(lengths), shard_index))
            shard_offsets.append(np.cumsum(lengths) - lengths)
        self.lengths, self.num_words, self.num_bytes = (_concatenate(parts) for parts in columns.values())
        self.token_offsets = np.cumsum(self.lengths) - self.lengths
        self._shard_indices, self._shard_offsets = _concatenate(shard_indices), _concatenate(shard_offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the tokens themselves.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents with ``bos_token_id``."""
        return int(self.lengths.sum())

    def document_tokens(self, index: int) -> TokenIds:
        """Return all tokens of a document, ``(length,)`` uint16 or uint32, a read-only view of the memory map."""
        return self.slice_tokens(index, 0, int(self.lengths[index]))

    def slice_tokens(self, index: int, start: int, stop: int) -> TokenIds:
        """Return tokens ``start`` to ``stop`` of a document (at most to its end), ``(tokens,)``, a read-only view.

        Raises DataError if the shard is damaged: it holds an id that the tokenizer does not have.
        """
        shard, offset = int(self._shard_indices[index]), int(self._shard_offsets[index])
        path = self.folder / self._shards[shard]["file"]
        if shard not in self._memmaps:
            self._memmaps[shard] = np.memmap(path, dtype=token_dtype(self.vocab_size), mode="r")
        stop = min(stop, int(self.lengths[index]))
        tokens = self._memmaps[shard][offset + start : offset + stop]
        # It would index past the model's embeddings.
        if tokens.size and (largest := int(tokens.max())) >= self.vocab_size:
            message = f"The token shard '{path}' is damaged: it holds token {largest} of {self.vocab_size}."
            raise DataError(message, REBUILD_HINT)
        return tokens

    def count_tokens(self) -> NDArray[np.int64]:
        """Return how often each id occurs, ``(vocab_size,)``; raises DataError for a damaged shard."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for index, length in enumerate(self.lengths.tolist()):
            for start in range(0, length, COUNT_CHUNK_SIZE):
                tokens = self.slice_tokens(index, start, start + COUNT_CHUNK_SIZE)
                ids, occurrences = np.unique(tokens, return_counts=True)
                counts[ids] += occurrences
        return counts

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the index; raises DataError with the damaged one."""
        for shard in self._shards:
            path = self.folder / shard["file"]
            if files.checksum(path) != shard["sha256"]:
                raise DataError(f"The token shard '{path}' is damaged.", REBUILD_HINT)


def write_index(folder: Path, shards: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """Close a store over the shards in this order, without those that have no documents.

    Returns the numbers of documents, tokens, words and bytes of text and of skipped rows, and the fingerprint.
    """
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    entries: list[dict[str, Any]] = []
    totals = {"documents": 0, "tokens": 0, "words": 0, "bytes": 0, "num_skipped": 0}
    for path in shards:
        raw = metadata_path(path).read_bytes()
        metadata = json.loads(raw)
        totals["num_skipped"] += metadata["num_skipped"]
        if not metadata["ids"]:
            continue
        digest.update(metadata["sha256"].encode())
        lengths_by_id = list(zip(metadata["ids"], metadata["lengths"], strict=True))
        digest.update(str(lengths_by_id).encode("utf-8", "surrogatepass"))
        entry = {name: metadata[name] for name in ("file", "size", "sha256")}
        entries.append({**entry, "metadata_sha256": hashlib.sha256(raw).hexdigest()})
        for total, column in (("tokens", "lengths"), ("words", "words"), ("bytes", "bytes")):
            totals[total] += sum(metadata[column])
        totals["documents"] += len(metadata["ids"])
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": digest.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "bos_token_id": tokenizer.bos_token_id,
        "vocab_size": tokenizer.vocab_size,
        "shards": entries,
    }
    files.write_json(folder / INDEX_NAME, {**index, "checksum": _index_checksum(index)})
    return {**totals, "fingerprint": index["fingerprint"]}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = files.read_json(folder / INDEX_NAME)
        version, checksum = index["version"], index.pop("checksum", None)
    except (MemtxError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{folder}' holds no whole token store ({error}).", REBUILD_HINT) from error
    if version != FORMAT_VERSION:
        raise DataError(f"'{folder}' has format version {version}, this release reads {FORMAT_VERSION}.", REBUILD_HINT)
    if checksum != _index_checksum(index):
        raise DataError(f"The index of the token store '{folder}' is damaged.", REBUILD_HINT)
    return dict(index)


def _index_checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _read_metadata(shard: Path, sha256: str) -> dict[str, Any]:
    path = metadata_path(shard)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"The metadata '{path}' cannot be read: {error.strerror}.", REBUILD_HINT) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(f"The metadata '{path}' is damaged.", REBUILD_HINT)
    return dict(json.loads(raw))


def _concatenate(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
