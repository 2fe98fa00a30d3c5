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

from memtx.errors import MemtxError, at_least

KEY = 16
"""Bytes of a key."""


def key(*parts: bytes) -> bytes:
    """Return the key of what stands in the parts, whose borders count."""
    digest = blake2b(digest_size=KEY)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def highest(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the highest (n, top) of scores (n, classes), float32, and their classes, int64.

    Where there are fewer classes, minus infinity fills up.
    """
    values, index = scores.float().topk(min(top, scores.shape[-1]), dim=-1)
    more = top - values.shape[-1]
    return torch.nn.functional.pad(values, (0, more), value=float("-inf")), torch.nn.functional.pad(index, (0, more))


class ScoreCache:
    """The scores of one teacher in one file of records of one size, appended to.

    A record that was cut short by a kill is overwritten. Keys are kept in memory, scores are not.

    Args:
        folder: made where it is missing; each teacher has a file of its own in it, so several runs may follow one
            another there, but not run at once.
        fingerprint: tells teachers, and how they read, apart.
        top: scores kept of each place.

    Raises:
        MemtxError: the file cannot be written to, or top is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, top: int) -> None:
        at_least(1, top=top)
        self.top = top
        self.path = Path(folder).expanduser() / f"{fingerprint[:32]}-{top}.scores"
        self.dtype = np.dtype([("key", f"V{KEY}"), ("values", "<f4", (top,)), ("index", "<i4", (top,))])
        self._places: dict[bytes, int] = {}
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
            self._places = {one.tobytes(): place for place, one in enumerate(self._mapped()["key"])}

    def __len__(self) -> int:
        return len(self._places)

    def _mapped(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        return np.memmap(self.path, self.dtype, mode="r")

    def get(self, keys: Sequence[bytes]) -> tuple[Tensor, Tensor] | None:
        """Return the (n, top) scores and classes of n keys; None unless all of them are there."""
        places = [self._places.get(one, -1) for one in keys]
        if -1 in places:
            return None
        found = self._mapped()[places] if places else np.zeros(0, self.dtype)
        return torch.from_numpy(found["values"].copy()), torch.from_numpy(found["index"].astype(np.int64))

    def put(self, keys: Sequence[bytes], values: Tensor, index: Tensor) -> None:
        """Keep scores and classes, (n, top) each, of n keys; what is there stays."""
        new = {one: row for row, one in enumerate(keys) if one not in self._places}
        made = np.zeros(len(new), self.dtype)
        rows = list(new.values())
        made["key"] = [np.void(one) for one in new]
        made["values"], made["index"] = values.cpu().numpy()[rows], index.cpu().numpy()[rows]
        self._file.write(made.tobytes())
        self._file.flush()
        self._places.update({one: len(self._places) + place for place, one in enumerate(new)})


class ScoreTable:
    """The scores of one teacher at every token of one store, in one file; it is sparse until it is filled.

    Args:
        folder: made where it is missing.
        fingerprint: tells teachers and stores apart.
        tokens: of the store.
        top: scores kept of each token.

    Raises:
        MemtxError: the file cannot be written to, or top is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, tokens: int, top: int) -> None:
        at_least(1, top=top)
        self.top = top
        self.path = Path(folder).expanduser() / f"{fingerprint[:32]}-{top}.table"
        dtype = np.dtype([("known", "?"), ("values", "<f4", (top,)), ("index", "<i4", (top,))])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as handle:
                handle.truncate(tokens * dtype.itemsize)
        except OSError as error:
            raise MemtxError(
                f"'{self.path}' cannot be written: {error.strerror}.", "Give the cache another folder."
            ) from error
        self._rows = np.memmap(self.path, dtype, mode="r+", shape=(tokens,))
        self._unknown = tokens - int(self._rows["known"].sum())

    @property
    def complete(self) -> bool:
        """Whether every token is there."""
        return not self._unknown

    def get(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and classes, (..., top) each, of (...) int64 places in the store."""
        found = self._rows[places.numpy()]
        return torch.from_numpy(found["values"].copy()), torch.from_numpy(found["index"].astype(np.int64))

    def put(self, places: Tensor, values: Tensor, index: Tensor) -> None:
        """Keep scores and classes, (n, top) each, of (n,) int64 places; what is there stays."""
        # Rows of a batch may read the same document, where there are few.
        where, first = np.unique(places.numpy(), return_index=True)
        new = ~self._rows["known"][where]
        where, first = where[new], first[new]
        made = np.zeros(len(where), self._rows.dtype)
        made["known"] = True
        made["values"], made["index"] = values.cpu().numpy()[first], index.cpu().numpy()[first]
        self._rows[where] = made
        self._unknown -= len(made)
