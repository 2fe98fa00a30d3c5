"""Zip files that carry the digest of their own bytes, as ``torch.save`` writes them: one file, one rename.

A zip file's checksums are of its entries, and ``torch.load`` does not look at them: a flipped bit becomes a weight.
Here SHA-256 of every byte stands in the archive's own comment, its last field, so any zip reader opens the file still.
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
"""What a zip file's last record begins with: 22 bytes, of which the last two count the comment's."""

_EOCD_SIZE = 22
_COMMENT_PATTERN = re.compile(rb"memtx step=(\d{20}) sha256=([0-9a-f]{64})")
_COMMENT_SIZE = len(b"memtx step= sha256=") + 20 + 64


class ChecksummedZipWriter:
    """A binary handle that digests what is written to it, for writers that go forward only.

    A write that fails is told when the file is sealed, not to the writer: torch's, in C++, would name no reason.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        self._tail = b""
        self._write_error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write, unless an earlier write failed."""
        size = memoryview(data).nbytes
        if self._write_error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._write_error = error
            self._digest.update(data)
            # A big block is not copied for its last bytes alone.
            self._tail = (self._tail + bytes(memoryview(data).cast("B")[-_EOCD_SIZE:]))[-_EOCD_SIZE:]
        return size

    def flush(self) -> None:
        """Do nothing: the end flushes."""

    def finalize(self, step: int) -> None:
        """Write the comment and close.

        Raises:
            OSError: this or an earlier write failed.
        """
        if self._write_error is not None:
            raise self._write_error
        assert self._tail.startswith(END_OF_CENTRAL_DIRECTORY)
        assert self._tail.endswith(b"\0\0")
        said = b"%020d" % step
        self._digest.update(said)
        comment = b"memtx step=%b sha256=%b" % (said, self._digest.hexdigest().encode())
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)
        self._file.close()

    def close(self) -> None:
        """Close, sealed or not."""
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def create(path: str | os.PathLike[str], step: int) -> Iterator[ChecksummedZipWriter]:
    """Yield a handle for one whole zip file, which appears under ``path`` with its digest, or not at all.

    Args:
        path: the file.
        step: a number that the seal says beside the digest, at least 0.

    Raises:
        MemtxError: the file cannot be written.
    """
    with files.atomic_path(path) as temporary:
        handle = ChecksummedZipWriter(temporary)
        try:
            yield handle
            handle.finalize(step)
        finally:
            handle.close()


def read_step(path: str | os.PathLike[str]) -> int | None:
    """Return the step that a file's seal says, unchecked; None where there is no such seal to read."""
    try:
        with open(path, "rb") as handle:
            handle.seek(-_COMMENT_SIZE, os.SEEK_END)
            found = _COMMENT_PATTERN.fullmatch(handle.read())
    except OSError:  # missing, or too short to seek in
        return None
    return int(found[1]) if found else None


def verify(path: str | os.PathLike[str]) -> None:
    """Read a whole file and compare it with its seal; without one, as earlier releases wrote, with the zip's checksums.

    Raises:
        CheckpointError: not every byte is the one that was written.
        OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as handle:
        handle.seek(max(0, size - _COMMENT_SIZE))
        found = _COMMENT_PATTERN.fullmatch(handle.read())
        if found is None:
            _verify_entries(path, size)
            return
        digest, left = hashlib.sha256(), size - _COMMENT_SIZE - 2
        handle.seek(0)
        while left > 0 and (block := handle.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        # The comment was not there yet when the bytes were digested.
        digest.update(b"\0\0" + found[1])
        if digest.hexdigest().encode() != found[2] or handle.read(2) != _COMMENT_SIZE.to_bytes(2, "little"):
            raise corrupt_checkpoint_error(path, ": its bytes are not those that were written")


def _verify_entries(path: str | os.PathLike[str], size: int) -> None:
    with open(path, "rb") as handle:
        handle.seek(max(0, size - _EOCD_SIZE))
        end = handle.read()
    if not size:
        raise corrupt_checkpoint_error(path, ": it is empty")
    # A comment that is counted but not there: the seal was cut off.
    if not end.startswith(END_OF_CENTRAL_DIRECTORY) or not end.endswith(b"\0\0"):
        raise corrupt_checkpoint_error(path, ": its end is missing or changed")
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
    except Exception as error:  # zipfile, zlib and struct raise a dozen kinds on bytes that are no zip file's
        raise corrupt_checkpoint_error(path, f": {error}") from error
    if wrong is not None:
        raise corrupt_checkpoint_error(path, f": '{wrong}' in it is not what was written")
