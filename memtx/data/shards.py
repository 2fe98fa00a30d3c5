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
from memtx.data.tokenize import metadata_path, token_dtype
from memtx.data.tokenizers import TokenIds, Tokenizer
from memtx.errors import DataError, MemtxError

FORMAT_VERSION = 3
INDEX_NAME = "index.json"
REBUILD_HINT = "Prepare the data again; whole shards are kept."


class TokenStore:
    """The tokens of one split, memory-mapped: document i is ``[bos_token_id, text tokens...]``.

    Args:
        folder: what :func:`write_index` closed.

    Attributes:
        ids: name of each document.
        titles: title of each document.
        lengths: (documents,) int64, tokens of each document with ``bos_token_id``.
        token_offsets: (documents,) int64, tokens of all documents before each.
        num_words: (documents,) int64, whitespace-separated words of each document's text.
        num_bytes: (documents,) int64, UTF-8 bytes of each document's text.
        bos_token_id: the id that begins a document.
        vocab_size: ids are below it.
        tokenizer_fingerprint: the tokenizer's fingerprint.
        fingerprint: SHA-256 over the tokens themselves and the tokenizer: equal only for equal data.

    Raises:
        DataError: the folder holds no store, one of another version, its index or a record is damaged, or a shard is
            missing or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.bos_token_id: int = index["bos_token_id"]
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        self.fingerprint: str = index["fingerprint"]
        self._shards: list[dict[str, Any]] = index["shards"]
        self._memmaps: dict[int, NDArray[Any]] = {}
        self.ids: list[str] = []
        self.titles: list[str] = []
        columns: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "words": [], "bytes": []}
        places, offsets = [], []
        for place, shard in enumerate(self._shards):
            path = self.folder / shard["file"]
            found = path.stat().st_size if path.is_file() else -1
            if found != shard["size"]:
                raise DataError(
                    f"The token shard '{path}' has {max(found, 0)} bytes, expected {shard['size']}.", REBUILD_HINT
                )
            record = _read_metadata(path, shard["metadata_sha256"])
            self.ids += record["ids"]
            self.titles += record["titles"] or record["ids"]
            for name, parts in columns.items():
                parts.append(np.array(record[name], dtype=np.int64))
            lengths = columns["lengths"][-1]
            places.append(np.full(len(lengths), place))
            offsets.append(np.cumsum(lengths) - lengths)
        self.lengths, self.num_words, self.num_bytes = (_concatenate(parts) for parts in columns.values())
        self.token_offsets = np.cumsum(self.lengths) - self.lengths
        self._shard_indices, self._shard_offsets = _concatenate(places), _concatenate(offsets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled memory map would carry the tokens themselves.
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, ``bos_token_id`` included."""
        return int(self.lengths.sum())

    def document_tokens(self, index: int) -> TokenIds:
        """Return all tokens of a document, (length,) uint16 or uint32, a read-only view of the map."""
        return self.slice_tokens(index, 0, int(self.lengths[index]))

    def slice_tokens(self, index: int, start: int, stop: int) -> TokenIds:
        """Return tokens ``start`` to ``stop`` (at most its length) of a document, (stop - start,), a read-only view.

        Raises:
            DataError: there is an id that the tokenizer does not have, since the shard is damaged.
        """
        shard, offset = int(self._shard_indices[index]), int(self._shard_offsets[index])
        path = self.folder / self._shards[shard]["file"]
        if shard not in self._memmaps:
            self._memmaps[shard] = np.memmap(path, dtype=token_dtype(self.vocab_size), mode="r")
        stop = min(stop, int(self.lengths[index]))
        found = self._memmaps[shard][offset + start : offset + stop]
        # It would be an index out of the embedding's range.
        if found.size and (largest := int(found.max())) >= self.vocab_size:
            raise DataError(
                f"The token shard '{path}' is damaged: it holds token {largest} of {self.vocab_size}.", REBUILD_HINT
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
                raise DataError(f"The token shard '{path}' is damaged.", REBUILD_HINT)


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
    totals = {"documents": 0, "tokens": 0, "words": 0, "bytes": 0, "num_skipped": 0}
    for path in shards:
        raw = metadata_path(path).read_bytes()
        record = json.loads(raw)
        totals["num_skipped"] += record["num_skipped"]
        if not record["ids"]:
            continue
        digest.update(record["sha256"].encode())
        digest.update(str(list(zip(record["ids"], record["lengths"], strict=True))).encode("utf-8", "surrogatepass"))
        kept.append({name: record[name] for name in ("file", "size", "sha256")})
        kept[-1]["metadata_sha256"] = hashlib.sha256(raw).hexdigest()
        totals["documents"] += len(record["ids"])
        totals["tokens"] += sum(record["lengths"])
        totals["words"] += sum(record["words"])
        totals["bytes"] += sum(record["bytes"])
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": digest.hexdigest(),
        "tokenizer": tokenizer.fingerprint,
        "bos_token_id": tokenizer.bos_token_id,
        "vocab_size": tokenizer.vocab_size,
        "shards": kept,
    }
    files.write_json(folder / INDEX_NAME, {**index, "checksum": _index_checksum(index)})
    return {**totals, "fingerprint": index["fingerprint"]}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = files.read_json(folder / INDEX_NAME)
        version, seal = index["version"], index.pop("checksum", None)
    except (MemtxError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{folder}' holds no whole token store ({error}).", REBUILD_HINT) from error
    if version != FORMAT_VERSION:
        raise DataError(f"'{folder}' has format version {version}, this release reads {FORMAT_VERSION}.", REBUILD_HINT)
    if seal != _index_checksum(index):
        raise DataError(f"The index of the token store '{folder}' is damaged.", REBUILD_HINT)
    assert isinstance(index, dict)
    return index


def _index_checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _read_metadata(shard: Path, sha256: str) -> dict[str, Any]:
    path = metadata_path(shard)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"The record '{path}' cannot be read: {error.strerror}.", REBUILD_HINT) from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DataError(f"The record '{path}' is damaged.", REBUILD_HINT)
    record: dict[str, Any] = json.loads(raw)
    return record


def _concatenate(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
