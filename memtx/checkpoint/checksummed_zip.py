"""Zip files with a checksum of all their bytes, as written by ``torch.save``.

A zip file's own checksums cover its entries, and ``torch.load`` ignores them: a flipped bit becomes a weight. Here the
SHA-256 of every byte is stored in the archive's comment, its last field, so any zip reader still opens the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from memtx import files
from memtx.errors import corrupt_checkpoint_error

END_OF_CENTRAL_DIRECTORY = b"PK\x05\x06"
"""Signature of a zip file's last record: 22 bytes, of which the last two hold the comment's length."""

_EOCD_SIZE = 22
_COMMENT_PATTERN = re.compile(rb"memtx step=(\d{20}) sha256=([0-9a-f]{64})")
_COMMENT_SIZE = len(b"memtx step= sha256=") + 20 + 64


class ChecksummedZipWriter:
    """Binary handle that hashes its input, for writers that never seek.

    A failed write raises in :meth:`finalize`: torch's writer, in C++, would lose the reason.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._tail = b""
        self._write_error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write ``data``, unless an earlier write failed; return its size."""
        size = memoryview(data).nbytes
        if self._write_error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._write_error = error
            self._digest.update(data)
            # Slicing the view avoids a copy of a large block.
            self._tail = (self._tail + bytes(memoryview(data).cast("B")[-_EOCD_SIZE:]))[-_EOCD_SIZE:]
        return size

    def flush(self) -> None:
        """Do nothing: closing flushes."""

    def finalize(self, step: int) -> None:
        """Write the comment and close; raises OSError if this or an earlier write failed."""
        if self._write_error is not None:
            raise self._write_error
        assert self._tail.startswith(END_OF_CENTRAL_DIRECTORY)
        assert self._tail.endswith(b"\0\0")
        digits = b"%020d" % step
        self._digest.update(digits)
        comment = b"memtx step=%b sha256=%b" % (digits, self._digest.hexdigest().encode())
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)
        self._file.close()

    def close(self) -> None:
        """Close, finalized or not."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def create(path: str | os.PathLike[str], step: int) -> Iterator[ChecksummedZipWriter]:
    """Yield a handle for one zip file, which appears under ``path`` with its checksum, or not at all.

    ``step``, at least 0, is stored beside the checksum. Raises MemtxError if the file cannot be written.
    """
    with files.atomic_path(path) as temporary:
        handle = ChecksummedZipWriter(temporary)
        try:
            yield handle
            handle.finalize(step)
        finally:
            handle.close()


def read_step(path: str | os.PathLike[str]) -> int | None:
    """Return the step stored in a file, without verifying the file; None if there is none."""
    try:
        with open(path, "rb") as handle:
            handle.seek(-_COMMENT_SIZE, os.SEEK_END)
            comment = _COMMENT_PATTERN.fullmatch(handle.read())
    except OSError:  # missing, or too short for a comment
        return None
    return int(comment[1]) if comment else None


def verify(path: str | os.PathLike[str]) -> None:
    """Compare a file with its checksum, or, if it has none (earlier releases), with the checksums of its entries.

    Raises CheckpointError if the file is damaged, OSError if it cannot be read.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as handle:
        handle.seek(max(0, size - _COMMENT_SIZE))
        comment = _COMMENT_PATTERN.fullmatch(handle.read())
        if comment is None:
            _verify_entries(path, size)
            return
        digest, remaining = hashlib.sha256(), size - _COMMENT_SIZE - 2
        handle.seek(0)
        while remaining > 0 and (block := handle.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
        # The bytes were hashed before the comment existed, when its length was 0.
        digest.update(b"\0\0" + comment[1])
        if digest.hexdigest().encode() != comment[2] or handle.read(2) != _COMMENT_SIZE.to_bytes(2, "little"):
            raise corrupt_checkpoint_error(path, ": its bytes are not those that were written")


def _verify_entries(path: str | os.PathLike[str], size: int) -> None:
    with open(path, "rb") as handle:
        handle.seek(max(0, size - _EOCD_SIZE))
        end = handle.read()
    if not size:
        raise corrupt_checkpoint_error(path, ": it is empty")
    # A comment's length without the comment: the checksum was cut off.
    if not end.startswith(END_OF_CENTRAL_DIRECTORY) or not end.endswith(b"\0\0"):
        raise corrupt_checkpoint_error(path, ": its end is missing or changed")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_entry = archive.testzip()
    except Exception as error:  # zipfile, zlib and struct raise a dozen types for files that are no zip files
        raise corrupt_checkpoint_error(path, f": {error}") from error
    if damaged_entry is not None:
        raise corrupt_checkpoint_error(path, f": '{damaged_entry}' in it is not what was written")
