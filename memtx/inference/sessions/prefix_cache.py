"""Prefix cache: states at segment borders of the prompts that were read, so that no prefix is read twice.

A snapshot is a state of fixed size. Its key is a chained hash of all tokens before it, so a prompt that begins as
another did continues from the deepest snapshot that both share, at a border where reading it alone would cut it too.

Snapshots are taken at the borders after 1, 2, 4, 8, ... segments, at the last two borders and at the end of a prompt,
and at the deepest border that was seen in an earlier prompt, where prompts branch off (Pan et al. 2025, Marconi,
section 4.1). So a prompt adds a logarithmic number of snapshots, and a prompt that shares a prefix for the first time
reads at most half of it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from memtx.errors import check_at_least
from memtx.inference.deadline import DeadlineExceededError, remaining_seconds
from memtx.inference.reader import ReaderSnapshot, SegmentResult, StreamReader, Totals
from memtx.inference.sessions.prefix_folder import PrefixFolder

MIN_TOKENS = 32
"""Tokens of the shortest prefix that is kept; reading fewer costs no more than the overhead of a call."""

MAX_SEEN_BORDERS = 1 << 15
"""Borders whose keys are remembered without a snapshot, to find where prompts branch off; about 6 MB."""

TENSOR_OVERHEAD_BYTES = 1024
"""Bytes per tensor for its Python object and allocation, which count for tiny states."""

WRITING_FRACTION = 0.25
"""Maximum fraction of ``max_bytes`` that waits to be written to disk; snapshots evicted beyond it are lost."""


@dataclass
class Prefix:
    """The borders of one prompt, of which the last is its end.

    Attributes:
        keys, lengths: Hash of all tokens before each border, and their number.
        index, snapshot: Deepest cached snapshot and its border; -1 and None if there is none.
        admitted: Keys of the borders to take snapshots of.
    """

    keys: list[bytes]
    lengths: list[int]
    index: int = -1
    snapshot: ReaderSnapshot | None = None
    admitted: set[bytes] = field(default_factory=set)

    @property
    def num_cached_tokens(self) -> int:
        """Number of tokens that need not be read."""
        return self.lengths[self.index] if self.snapshot is not None else 0


class PrefixCache:
    """Snapshots of one model, in memory and on disk, least recently used first; safe to use from any thread.

    Counters are ``hits``, ``misses``, ``hit_tokens`` and ``evictions``.

    Args:
        fingerprint: Fingerprint of the model.
        max_bytes: Maximum bytes in memory, including snapshots that wait to be written.
        folder: Receives evicted snapshots; None discards them.
    """

    def __init__(self, fingerprint: str, max_bytes: int, folder: PrefixFolder | None = None) -> None:
        check_at_least(1, max_bytes=max_bytes)
        self.fingerprint, self.max_bytes, self.folder = fingerprint, max_bytes, folder
        self.counters = dict.fromkeys(("hits", "misses", "hit_tokens", "evictions"), 0)
        # Reentrant: a closed folder reports a snapshot as written at once.
        self._lock = threading.RLock()
        self._snapshots: OrderedDict[bytes, ReaderSnapshot] = OrderedDict()
        self._snapshot_bytes = self._writing_bytes = 0
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._in_progress: dict[bytes, Future[ReaderSnapshot | None]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return self._snapshot_bytes + self._writing_bytes

    @property
    def num_disk_bytes(self) -> int:
        """Bytes on disk."""
        return self.folder.num_bytes if self.folder is not None else 0

    @property
    def num_snapshots(self) -> int:
        """Number of snapshots in memory."""
        return len(self._snapshots)

    def prefix(self, reader: StreamReader, tokens: NDArray[np.int64], namespace: str) -> Prefix:
        """Return the borders of a prompt that a reader at the beginning of a text has consumed.

        Only prompts of the same ``namespace``, such as an API key, share snapshots.
        """
        # The state's structure covers every setting that changes it, such as a window chosen when the model was loaded.
        structure = [(name, str(leaf.dtype), list(leaf.shape)) for name, leaf in reader.state.named_tensors().items()]
        cuts = [reader.segment_length, reader.splits_documents]
        root = [self.fingerprint, namespace, cuts, reader.last_token, structure]
        digest = hashlib.blake2b(json.dumps(root).encode(), digest_size=32)
        keys, lengths = [], reader.segment_ends()
        for start, end in zip([0, *lengths], lengths, strict=False):
            digest.update(tokens[start:end].astype("<i8").tobytes())
            keys.append(digest.digest())
        return Prefix(keys, lengths)

    @contextlib.contextmanager
    def open(self, prefix: Prefix, deadline: float | None = None) -> Iterator[None]:
        """Find the deepest snapshot of a prompt, and collect those that it lacks in the block with :meth:`add`.

        If another thread is reading the same prefix, wait for it; raises DeadlineExceededError after ``deadline``.
        """
        if (future := self._find_in_progress(prefix)) is not None:
            try:
                snapshot = future[1].result(remaining_seconds(deadline))
            except TimeoutError:
                raise DeadlineExceededError from None
            if snapshot is not None:
                prefix.index, prefix.snapshot = future[0], snapshot
        self._find(prefix)
        futures = self._register(prefix)
        try:
            yield
        finally:
            with self._lock:
                for key, announced in futures.items():
                    if self._in_progress.get(key) is announced:
                        del self._in_progress[key]
            for announced in futures.values():
                if not announced.done():
                    announced.set_result(None)

    def _find_in_progress(self, prefix: Prefix) -> tuple[int, Future[ReaderSnapshot | None]] | None:
        """Return the deepest border that another thread will reach, unless a deeper one is cached."""
        with self._lock:
            for index in reversed(range(len(prefix.keys))):
                if self._contains(prefix.keys[index]):
                    return None
                if (future := self._in_progress.get(prefix.keys[index])) is not None:
                    return index, future
        return None

    def _contains(self, key: bytes) -> bool:
        return key in self._snapshots or (self.folder is not None and key in self.folder)

    def _find(self, prefix: Prefix) -> None:
        for index in range(len(prefix.keys) - 1, prefix.index, -1):
            key = prefix.keys[index]
            with self._lock:
                if (snapshot := self._snapshots.get(key)) is not None:
                    self._snapshots.move_to_end(key)
            if snapshot is None and self.folder is not None:
                snapshot = self.folder.load(key, prefix.lengths[index])
                if snapshot is not None:
                    snapshot = replace(snapshot, state=snapshot.state.map(_compact))
                    self._insert(key, snapshot)
            if snapshot is not None:
                prefix.index, prefix.snapshot = index, snapshot
                break
        with self._lock:
            self.counters["hits" if prefix.snapshot is not None else "misses"] += 1
            self.counters["hit_tokens"] += prefix.num_cached_tokens

    def _register(self, prefix: Prefix) -> dict[bytes, Future[ReaderSnapshot | None]]:
        """Choose the borders to take snapshots of, and announce them to other threads."""
        keys, num_borders = prefix.keys, len(prefix.keys)
        indices = {(1 << power) - 1 for power in range(num_borders.bit_length())}
        indices |= set(range(max(num_borders - 3, 0), num_borders))
        futures: dict[bytes, Future[ReaderSnapshot | None]] = {}
        with self._lock:
            seen = [index for index, key in enumerate(keys) if key in self._seen]
            indices |= set(seen[-1:])
            for key in keys:
                self._seen[key] = None
                self._seen.move_to_end(key)
            while len(self._seen) > MAX_SEEN_BORDERS:
                self._seen.popitem(last=False)
            indices = {index for index in indices if prefix.index < index < num_borders}
            prefix.admitted = {keys[index] for index in indices if prefix.lengths[index] >= MIN_TOKENS}
            for key in prefix.admitted:
                if key not in self._in_progress:
                    futures[key] = self._in_progress[key] = Future()
        return futures

    def add(self, prefix: Prefix, reader: StreamReader) -> None:
        """Keep the state of a reader that has read a prompt up to a border, if it is one of those to keep."""
        totals = Totals(nll=reader.totals.nll, num_tokens=reader.totals.num_tokens)
        key = prefix.keys[prefix.lengths.index(totals.num_tokens)]
        if key not in prefix.admitted:
            return
        empty = np.empty(0, dtype=np.int64)
        snapshot = ReaderSnapshot(reader.state.map(_compact), reader.last_token, empty, "", b"", totals)
        self._insert(key, snapshot)
        with self._lock:
            future = self._in_progress.pop(key, None)
        if future is not None and not future.done():
            future.set_result(snapshot)

    def _insert(self, key: bytes, snapshot: ReaderSnapshot) -> None:
        if (size := _size(snapshot)) > self.max_bytes:
            return
        with self._lock:
            if key in self._snapshots:
                return
            while self.num_bytes + size > self.max_bytes and self._snapshots:
                self._evict()
            if self.num_bytes + size <= self.max_bytes:
                self._snapshots[key] = snapshot
                self._snapshot_bytes += size

    def _evict(self) -> None:
        key, snapshot = self._snapshots.popitem(last=False)
        size = _size(snapshot)
        self._snapshot_bytes -= size
        self.counters["evictions"] += 1
        is_small = self._writing_bytes + size <= WRITING_FRACTION * self.max_bytes
        if self.folder is not None and key not in self.folder and is_small:
            self._writing_bytes += size
            self.folder.write(key, snapshot, lambda: self._on_written(size))

    def _on_written(self, size: int) -> None:
        with self._lock:
            self._writing_bytes -= size

    def close(self) -> None:
        """Finish writing to disk."""
        if self.folder is not None:
            self.folder.close()


def _compact(leaf: Tensor) -> Tensor:
    """Return a tensor in main memory that keeps no larger one alive, as a view of a batch would."""
    leaf = leaf.detach().cpu()
    return leaf.clone() if leaf.untyped_storage().nbytes() != leaf.nbytes else leaf


def _size(snapshot: ReaderSnapshot) -> int:
    return snapshot.state.nbytes + TENSOR_OVERHEAD_BYTES * len(pytree.tree_leaves(snapshot.state))


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read.

    Attributes:
        reader: Reader at its end.
        tokens: ``(length,)`` int64, all tokens, including text that was pending in the reader.
        results: Scores of the tokens after the first ``num_cached_tokens``, which were not read.
    """

    reader: StreamReader
    tokens: NDArray[np.int64]
    results: list[SegmentResult]
    num_cached_tokens: int = 0


def read_prompt(
    reader: StreamReader,
    prompt: str | Sequence[int],
    cache: PrefixCache | None = None,
    *,
    namespace: str = "",
    deadline: float | None = None,
    discard_state: bool = False,
    needs_scores: bool = False,
) -> ReadPrompt:
    """Read a prompt to its end.

    Args:
        prompt: Text or token ids.
        reader: Reader to advance. Only one at the beginning of its text uses the cache.
        cache: Prefix cache of the reader's model. Defaults to none.
        namespace: As in :meth:`PrefixCache.prefix`.
        deadline: As in :meth:`PrefixCache.open`.
        discard_state: As in :meth:`~memtx.inference.reader.StreamReader.finish`.
        needs_scores: If True, read all tokens, because a snapshot has no scores.
    """
    is_fresh = not reader.totals.num_tokens
    tokens = reader.consume(prompt)
    if cache is None or needs_scores or discard_state or not is_fresh or len(tokens) < MIN_TOKENS:
        return ReadPrompt(reader, tokens, list(reader.finish(discard_state=discard_state)))
    prefix, results = cache.prefix(reader, tokens, namespace), []
    with cache.open(prefix, deadline):
        if prefix.snapshot is not None:
            reader.skip(prefix.snapshot)
        for result in reader.finish():
            results.append(result)
            cache.add(prefix, reader)
    return ReadPrompt(reader, tokens, results, prefix.num_cached_tokens)
