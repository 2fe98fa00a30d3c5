"""Top-k logits of a teacher in memory-mapped files, so that it reads each text once.

``LogitCache`` stores them by a key of the tokens, ``LogitTable`` by the position of a token in a corpus that is read in
whole documents, where a memory transformer's logits are a function of the position.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tasks.batches import TaskBatch
from memtx.errors import MemtxError, check_at_least
from memtx.training.distillation.losses import CHUNK_SIZE

_Records = np.ndarray[Any, np.dtype[np.void]]

KEY_BYTES = 16
"""Bytes per key."""


def make_key(*parts: bytes) -> bytes:
    """Return a key of the parts; their boundaries count."""
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def make_task_keys(batch: TaskBatch) -> list[bytes]:
    """Return a key for each scored label of a batch, from the unpadded tokens of its text and the label's number."""
    keys = []
    scored = (batch.labels != IGNORE_INDEX).reshape(len(batch.tokens), -1)
    for index, mask in enumerate(batch.attention_mask.bool()):
        parts = [
            tensor[index][mask].cpu().numpy().tobytes()
            for tensor in (batch.tokens, batch.token_type_ids, batch.global_attention_mask)
        ]
        keys += [make_key(*parts, str(label).encode()) for label in scored[index].nonzero()[:, 0].tolist()]
    return keys


def top_k_logits(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top k of ``(n, classes)`` logits, ``(n, top_k)`` float32, and their classes, int64.

    With fewer classes, the values are padded with minus infinity.
    """
    values, classes = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    padding = (0, top_k - values.shape[-1])
    return torch.nn.functional.pad(values, padding, value=float("-inf")), torch.nn.functional.pad(classes, padding)


class _LogitFile:
    """File of records of fixed size: a field of the subclass and the top-k logits of a position.

    ``num_records`` is their fixed number; None means that the file grows.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        name: str,
        top_k: int,
        field: tuple[str, str],
        num_records: int | None = None,
    ) -> None:
        check_at_least(1, top_k=top_k)
        self.top_k = top_k
        self.path = Path(cache_dir).expanduser() / name
        self.dtype = np.dtype([field, ("values", "<f4", (top_k,)), ("index", "<i4", (top_k,))])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  (open for as long as the run)
            if num_records is not None:
                self._file.truncate(num_records * self.dtype.itemsize)
        except OSError as error:
            raise MemtxError(
                f"'{self.path}' cannot be written: {error.strerror}.", "Choose another cache_dir."
            ) from error

    def _pack(self, logits: Tensor, classes: Tensor, selected: Any) -> _Records:
        records = np.zeros(len(selected), self.dtype)
        records["values"], records["index"] = logits.cpu().numpy()[selected], classes.cpu().numpy()[selected]
        return records

    @staticmethod
    def _unpack(records: _Records) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(records["values"].copy()), torch.from_numpy(records["index"].astype(np.int64))


class LogitCache(_LogitFile):
    """Logits of one teacher by key, in a file that grows.

    A record that a kill truncated is overwritten. Keys are kept in memory, logits are not.

    Args:
        cache_dir: Folder of the cache; created if missing. Each teacher has its own file, which runs can share one
            after another but not at the same time.
        fingerprint: Identifies the teacher.
        top_k: Logits per position.

    Raises:
        MemtxError: The file cannot be written, or ``top_k`` is not positive.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], fingerprint: str, top_k: int) -> None:
        super().__init__(cache_dir, f"{fingerprint[:32]}-{top_k}.scores", top_k, ("key", f"V{KEY_BYTES}"))
        self._record_numbers: dict[bytes, int] = {}
        num_records = self.path.stat().st_size // self.dtype.itemsize
        self._file.truncate(num_records * self.dtype.itemsize)
        if num_records:
            self._record_numbers = {key.tobytes(): number for number, key in enumerate(self._map_records()["key"])}

    def __len__(self) -> int:
        return len(self._record_numbers)

    def _map_records(self) -> _Records:
        return np.memmap(self.path, self.dtype, mode="r")

    def get(self, keys: Sequence[bytes]) -> tuple[Tensor, Tensor] | None:
        """Return logits and classes, each ``(n, top_k)``, of n keys; None unless all are stored."""
        numbers = [self._record_numbers.get(key, -1) for key in keys]
        if -1 in numbers:
            return None
        return self._unpack(self._map_records()[numbers] if numbers else np.zeros(0, self.dtype))

    def put(self, keys: Sequence[bytes], logits: Tensor, classes: Tensor) -> None:
        """Store logits and classes, each ``(n, top_k)``, of n keys; stored keys keep their record."""
        selected = {key: index for index, key in enumerate(keys) if key not in self._record_numbers}
        records = self._pack(logits, classes, list(selected.values()))
        records["key"] = [np.void(key) for key in selected]
        self._file.write(records.tobytes())
        self._file.flush()
        first = len(self._record_numbers)
        self._record_numbers.update({key: first + number for number, key in enumerate(selected)})


class LogitTable(_LogitFile):
    """Logits of one teacher at every token of one corpus, in a file that is sparse until it is filled.

    Arguments and errors as for :class:`LogitCache`; ``fingerprint`` identifies the corpus too, of ``num_tokens``.
    """

    def __init__(self, cache_dir: str | os.PathLike[str], fingerprint: str, num_tokens: int, top_k: int) -> None:
        super().__init__(cache_dir, f"{fingerprint[:32]}-{top_k}.table", top_k, ("known", "?"), num_tokens)
        self._records = np.memmap(self.path, self.dtype, mode="r+", shape=(num_tokens,))
        self._num_missing = num_tokens - int(self._records["known"].sum())

    @property
    def is_complete(self) -> bool:
        """True if every token is stored."""
        return not self._num_missing

    def get(self, token_indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and classes, each ``(..., top_k)``, of ``(...)`` int64 token indices."""
        return self._unpack(self._records[token_indices.numpy()])

    def put(self, token_indices: Tensor, logits: Tensor, classes: Tensor) -> None:
        """Store logits and classes, each ``(n, top_k)``, of ``(n,)`` int64 token indices; stored tokens stay."""
        # Streams of a batch may read the same document if there are few documents.
        indices, selected = np.unique(token_indices.numpy(), return_index=True)
        new = ~self._records["known"][indices]
        records = self._pack(logits, classes, selected[new])
        records["known"] = True
        self._records[indices[new]] = records
        self._num_missing -= len(records)

    @torch.no_grad()
    def fill(self, token_indices: Tensor, head: Callable[[Tensor], Tensor], hidden_states: Tensor) -> None:
        """Store the logits of a batch.

        ``token_indices`` are ``(batch, length)`` int64, ``head`` computes logits ``(n, vocab)`` from ``(n, dim)``, and
        ``hidden_states`` are the outputs of the teacher's last layer, ``(batch, length, dim)``.
        """
        indices, hidden = token_indices.flatten(), hidden_states.flatten(0, 1)
        for start in range(0, len(indices), CHUNK_SIZE):
            part = slice(start, start + CHUNK_SIZE)
            self.put(indices[part], *top_k_logits(head(hidden[part]), self.top_k))
