"""Tokens on disk, read through memory maps: a folder of shards, their records, and the index that seals them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtx import files
from memtx.data.encoding import record_path, token_dtype
from memtx.data.tokenizers import Ids, Tokenizer
from memtx.errors import DataError, MemtxError

FORMAT_VERSION = 2
INDEX = "index.json"
CURE = "Prepare the data again; whole shards are kept."


class TokenStore:
    """The tokens of one split, memory-mapped: document i is ``[begin, text tokens...]``.

    Args:
        folder: what :func:`write_index` closed.

    Attributes:
        ids: name of each document.
        titles: title of each document.
        lengths: (documents,) int64, tokens of each document with ``begin``.
        begins: (documents,) int64, tokens of all documents before each.
        words: (documents,) int64, whitespace-separated words of each document's text.
        bytes: (documents,) int64, UTF-8 bytes of each document's text.
        begin: the id that begins a document.
        vocab_size: ids are below it.
        tokenizer: the tokenizer's fingerprint.
        fingerprint: SHA-256 over the tokens themselves and the tokenizer: equal only for equal data.

    Raises:
        DataError: the folder holds no store, one of another version, its index or a record is damaged, or a shard is
            missing or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.begin: int = index["begin"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer: str = index["tokenizer"]
        self.fingerprint: str = index["fingerprint"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._maps: dict[int, NDArray[Any]] = {}
        self.ids: list[str] = []
        self.titles: list[str] = []
        columns: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "words": [], "bytes": []}
        places, offsets = [], []
        for place, shard in enumerate(self._shards):
            path = self.folder / shard["file"]
            found = path.stat().st_size if path.is_file() else -1
            if found != shard["size"]:
                raise DataError(f"The token shard '{path}' has {max(found, 0)} bytes, expected {shard['size']}.", CURE)
            record = _read_record(path, shard["record"])
            self.ids += record["ids"]
            self.titles += record["titles"] or record["ids"]
            for name, parts in columns.items():
                parts.append(np.array(record[name], dtype=np.int64))
            lengths = columns["lengths"][-1]
            places.append(np.full(len(lengths), place))
            offsets.append(np.cumsum(lengths) - lengths)
        self.lengths, self.words, self.bytes = (_joined(parts) for parts in columns.values())
        self.begins = np.cumsum(self.lengths) - self.lengths
        self._places, self._offsets = _joined(places), _joined(offsets)

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
        """Return tokens ``start`` to ``stop`` (at most its length) of a document, (stop - start,), a read-only view.

        Raises:
            DataError: there is an id that the tokenizer does not have, since the shard is damaged.
        """
        shard, offset = int(self._places[index]), int(self._offsets[index])
        path = self.folder / self._shards[shard]["file"]
        if shard not in self._maps:
            self._maps[shard] = np.memmap(path, dtype=token_dtype(self.vocab_size), mode="r")
        stop = min(stop, int(self.lengths[index]))
        found = self._maps[shard][offset + start : offset + stop]
        # It would be an index out of the embedding's range.
        if found.size and (largest := int(found.max())) >= self.vocab_size:
            raise DataError(
                f"The token shard '{path}' is damaged: it holds token {largest} of {self.vocab_size}.", CURE
            )
        return found

    def verify(self) -> None:
        """Read every shard and compare its SHA-256 with the index.

        Raises:
            DataError: a shard is damaged; names it.
        """
        for shard in self._shards:
            path = self.folder / shard["file"]
            if files.checksum(path) != shard["sha256"]:
                raise DataError(f"The token shard '{path}' is damaged.", CURE)


def write_index(folder: Path, shards: Sequence[Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """Close a store over the shards that were written, in this order.

    Args:
        folder: of the shards.
        shards: each with its record; those without documents are left out.
        tokenizer: what they were encoded with.

    Returns:
        What to say of it: documents, tokens, words and bytes of text, rows left out, and the fingerprint.
    """
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    kept: list[dict[str, Any]] = []
    totals = {"documents": 0, "tokens": 0, "words": 0, "bytes": 0, "left_out": 0}
    for path in shards:
        raw = record_path(path).read_bytes()
        record = json.loads(raw)
        totals["left_out"] += record["left_out"]
        if not record["ids"]:
            continue
        digest.update(record["sha256"].encode())
        digest.update(str(list(zip(record["ids"], record["lengths"], strict=True))).encode("utf-8", "surrogatepass"))
        kept.append({name: record[name] for name in ("file", "size", "sha256")})
        kept[-1]["record"] = hashlib.sha256(raw).hexdigest()
        totals["documents"] += len(record["ids"])
        totals["tokens"] += sum(record["lengths"])
        totals["words"] += sum(record["words"])
        totals["bytes"] += sum(record["bytes"])
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": digest.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "begin": tokenizer.begin,
        "vocab_size": tokenizer.vocab_size,
        "shards": kept,
    }
    files.write_json(folder / INDEX, {**index, "seal": _seal(index)})
    return {**totals, "fingerprint": index["fingerprint"]}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = files.read_json(folder / INDEX)
        version, seal = index["version"], index.pop("seal", None)
    except (MemtxError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{folder}' holds no whole token store ({error}).", CURE) from error
    if version != FORMAT_VERSION:
        raise DataError(f"'{folder}' has format version {version}, this release reads {FORMAT_VERSION}.", CURE)
    if seal != _seal(index):
        raise DataError(f"The index of the token store '{folder}' is damaged.", CURE)
    assert isinstance(index, dict)
    return index


def _seal(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _read_record(shard: Path, sha256: str) -> dict[str, Any]:
    path = record_path(shard)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"The record '{path}' cannot be read: {error.strerror}.", CURE) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(f"The record '{path}' is damaged.", CURE)
    record: dict[str, Any] = json.loads(raw)
    return record


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
