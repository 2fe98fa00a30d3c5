"""A teacher's highest scores on disk, memory-mapped, so that what it read once it need not read again.

Of examples by a key of what was read; of streams of text by the token's place, where each is read once a pass, with all
that comes before it in its document: what a memory transformer says there is a function of the place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memtx.errors import MemtxError, check_at_least

KEY_BYTES = 16
"""Bytes of a key."""


def make_key(*parts: bytes) -> bytes:
    """Return the key of what stands in the parts, whose borders count."""
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def top_k_logits(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the highest (n, top) of scores (n, classes), float32, and their classes, int64.

    Where there are fewer classes, minus infinity fills up.
    """
    values, index = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    more = top_k - values.shape[-1]
    return torch.nn.functional.pad(values, (0, more), value=float("-inf")), torch.nn.functional.pad(index, (0, more))


class LogitCache:
    """The scores of one teacher in one file of records of one size, appended to.

    A record that was cut short by a kill is overwritten. Keys are kept in memory, scores are not.

    Args:
        cache_dir: made where it is missing; each teacher has a file of its own in it, so several runs may follow one
            another there, but not run at once.
        fingerprint: tells teachers, and how they read, apart.
        top_k: scores kept of each place.

    Raises:
        MemtxError: the file cannot be written to, or top_k is not positive.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], fingerprint: str, top_k: int) -> None:
        check_at_least(1, top_k=top_k)
        self.top_k = top_k
        self.path = Path(cache_dir).expanduser() / f"{fingerprint[:32]}-{top_k}.scores"
        self.dtype = np.dtype([("key", f"V{KEY_BYTES}"), ("values", "<f4", (top_k,)), ("index", "<i4", (top_k,))])
        self._record_numbers: dict[bytes, int] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  (for as long as the run)
        except OSError as error:
            raise MemtxError(
                f"'{self.path}' cannot be written: {error.strerror}.", "Give the cache another folder."
            ) from error
        whole = self.path.stat().st_size // self.dtype.itemsize
        self._file.truncate(whole * self.dtype.itemsize)
        if whole:
            self._record_numbers = {one.tobytes(): place for place, one in enumerate(self._map_records()["key"])}

    def __len__(self) -> int:
        return len(self._record_numbers)

    def _map_records(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.memmap(self.path, self.dtype, mode="r")

    def get(self, keys: Sequence[bytes]) -> tuple[Tensor, Tensor] | None:
        """Return the (n, top) scores and classes of n keys; None unless all of them are there."""
        places = [self._record_numbers.get(one, -1) for one in keys]
        if -1 in places:
            return None
        found = self._map_records()[places] if places else np.zeros(0, self.dtype)
        return torch.from_numpy(found["values"].copy()), torch.from_numpy(found["index"].astype(np.int64))

    def put(self, keys: Sequence[bytes], logits: Tensor, class_indices: Tensor) -> None:
        """Keep scores and classes, (n, top) each, of n keys; what is there stays."""
        new = {one: row for row, one in enumerate(keys) if one not in self._record_numbers}
        made = np.zeros(len(new), self.dtype)
        rows = list(new.values())
        made["key"] = [np.void(one) for one in new]
        made["values"], made["index"] = logits.cpu().numpy()[rows], class_indices.cpu().numpy()[rows]
        self._file.write(made.tobytes())
        self._file.flush()
        self._record_numbers.update({one: len(self._record_numbers) + place for place, one in enumerate(new)})


class LogitTable:
    """The scores of one teacher at every token of one store, in one file; it is sparse until it is filled.

    Args:
        cache_dir: made where it is missing.
        fingerprint: tells teachers and stores apart.
        num_tokens: of the store.
        top_k: scores kept of each token.

    Raises:
        MemtxError: the file cannot be written to, or top_k is not positive.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], fingerprint: str, num_tokens: int, top_k: int) -> None:
        check_at_least(1, top_k=top_k)
        self.top_k = top_k
        self.path = Path(cache_dir).expanduser() / f"{fingerprint[:32]}-{top_k}.table"
        dtype = np.dtype([("known", "?"), ("values", "<f4", (top_k,)), ("index", "<i4", (top_k,))])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as handle:
                handle.truncate(num_tokens * dtype.itemsize)
        except OSError as error:
            raise MemtxError(
                f"'{self.path}' cannot be written: {error.strerror}.", "Give the cache another folder."
            ) from error
        self._records = np.memmap(self.path, dtype, mode="r+", shape=(num_tokens,))
        self._num_missing = num_tokens - int(self._records["known"].sum())

    @property
    def is_complete(self) -> bool:
        """Whether every token is there."""
        return not self._num_missing

    def get(self, token_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and classes, (..., top) each, of (...) int64 places in the store."""
        found = self._records[token_indices.numpy()]
        return torch.from_numpy(found["values"].copy()), torch.from_numpy(found["index"].astype(np.int64))

    def put(self, token_indices: Tensor, logits: Tensor, class_indices: Tensor) -> None:
        """Keep scores and classes, (n, top) each, of (n,) int64 places; what is there stays."""
        # Rows of a batch may read the same document, where there are few.
        where, first = np.unique(token_indices.numpy(), return_index=True)
        new = ~self._records["known"][where]
        where, first = where[new], first[new]
        made = np.zeros(len(where), self._records.dtype)
        made["known"] = True
        made["values"], made["index"] = logits.cpu().numpy()[first], class_indices.cpu().numpy()[first]
        self._records[where] = made
        self._num_missing -= len(made)
