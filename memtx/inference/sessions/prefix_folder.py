"""Prefix folder: snapshots of the prefix cache on disk, one file each, written in the background."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from memtx import files
from memtx.errors import CheckpointError, MemtxError, check_at_least
from memtx.inference.reader import ReaderSnapshot, StreamReader
from memtx.inference.sessions.file import Fingerprints, load_session, save_session

SUFFIX = ".prefix"

log = logging.getLogger(__name__)


class PrefixFolder:
    """Snapshots on disk, at most ``max_bytes``, least recently used first, in the format of session files.

    A file that cannot be written or is damaged is removed with a line in the log. Files of an earlier process are used
    again: a key covers model and tokens. Only one process may use the folder, which is created.

    Args:
        template_reader: Reader of the model; its forks save and load the snapshots.
    """

    def __init__(self, path: Path, max_bytes: int, template_reader: StreamReader, fingerprints: Fingerprints) -> None:
        check_at_least(1, max_bytes=max_bytes)
        self.path, self.max_bytes, self.num_bytes = path, max_bytes, 0
        self._template_reader, self._fingerprints = template_reader, fingerprints
        self._lock = Lock()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, "memtx-prefix-writer")
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            files.remove_temporary_files(path)
            entries = [(file.stat(), file) for file in path.glob(f"*{SUFFIX}") if not file.is_symlink()]
        except OSError as error:
            message = f"The folder '{path}' cannot be used: {error.strerror}."
            raise MemtxError(message, "Check its permissions.") from error
        for status, file in sorted(entries, key=lambda entry: entry[0].st_mtime_ns):
            with contextlib.suppress(ValueError):
                self._add(bytes.fromhex(file.stem), status.st_size)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def write(self, key: bytes, snapshot: ReaderSnapshot, on_done: Callable[[], None]) -> None:
        """Write a snapshot in the background, then call ``on_done``."""

        def save() -> None:
            reader, path = self._template_reader.fork(), self._file(key)
            reader.restore(snapshot)
            try:
                save_session(path, reader, metadata={"key": key.hex()}, fingerprints=self._fingerprints)
                self._add(key, path.stat().st_size)
            except (MemtxError, OSError) as error:
                log.warning("A snapshot of the prefix cache was lost: %s", error)
            finally:
                on_done()

        try:
            self._executor.submit(save)
        except RuntimeError:  # The folder is closed.
            on_done()

    def load(self, key: bytes, num_tokens: int) -> ReaderSnapshot | None:
        """Return the snapshot of a prefix of ``num_tokens`` tokens; None if there is none, or it is damaged."""
        if key not in self._sizes:
            return None
        reader, path = self._template_reader.fork(), self._file(key)
        try:
            metadata, _ = load_session(path, reader, fingerprints=self._fingerprints)
            snapshot = reader.snapshot()
            if metadata.get("key") != key.hex() or snapshot.totals.num_tokens != num_tokens:
                raise CheckpointError(f"'{path}' is the snapshot of another prefix.")
            os.utime(path)
        except (CheckpointError, OSError) as error:
            if key in self._sizes:  # It was not removed for space while it was loaded.
                log.warning("A snapshot of the prefix cache was removed: %s", error)
                self._remove(key)
            return None
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)
        return snapshot

    def _file(self, key: bytes) -> Path:
        return self.path / f"{key.hex()}{SUFFIX}"

    def _add(self, key: bytes, size: int) -> None:
        with self._lock:
            self.num_bytes += size - self._sizes.pop(key, 0)
            self._sizes[key] = size
            oldest = iter(list(self._sizes))
            num_bytes, removed = self.num_bytes, []
            while num_bytes > self.max_bytes:
                removed.append(key := next(oldest))
                num_bytes -= self._sizes[key]
        for key in removed:
            self._remove(key)

    def _remove(self, key: bytes) -> None:
        with self._lock:
            self.num_bytes -= self._sizes.pop(key, 0)
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    def close(self) -> None:
        """Finish the files that are being written."""
        self._executor.shutdown()
