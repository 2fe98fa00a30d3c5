"""One text of a corpus: where it is, and how to read it without holding it all; and the parts that sources are of."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memtx.data.text_chunks import decode_utf8
from memtx.errors import DataError

READ_SIZE = 1 << 20
"""Bytes of a file read at once."""


class SourcePart(ABC):
    """A piece of a source that one process reads: a file, a stretch of lines, some rows of a table.

    A kind is a frozen dataclass of values that JSON can hold, so that another process can be told of it.

    Attributes:
        size: bytes in the source (compressed ones, where it is compressed), for planning and for the bar.
        is_process_local: whether this process alone can read it, as a file system in memory.
    """

    size: int
    is_process_local: bool = False

    @property
    @abstractmethod
    def cache_key(self) -> str:
        """What changes when the text changes, as far as can be told without reading it."""

    @abstractmethod
    def iter_documents(self) -> Iterator[Document]:
        """Yield whole documents in a fixed order; each is to be read before the next is asked for.

        Raises:
            DataError: the part cannot be read; names it and the place in it.
        """


@dataclass(frozen=True)
class Document(SourcePart):
    """One text with a beginning, not read yet.

    Attributes:
        id: its name, unique within the split.
        title: what to call it before people; the id where nothing better is known.
        size: bytes of UTF-8.
        path: the file; None where ``text`` holds it.
        byte_offset: the byte of the file where it begins.
        text: the text itself, for sources without a file.
        is_table_row: whether it is a row of a table, which is left out where it has no word.
    """

    id: str
    title: str
    size: int
    path: str | None = None
    byte_offset: int = 0
    text: str = ""
    is_table_row: bool = False

    @property
    def cache_key(self) -> str:
        """What changes when the text changes: name, place, size and time of the file, or a hash of the text."""
        if self.path is None:
            return f"{self.id}:{hashlib.sha256(self.text.encode()).hexdigest()}"
        return f"{self.id}:{self.byte_offset}:{self.size}:{Path(self.path).stat().st_mtime_ns}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield itself: a text by itself is a part."""
        yield self

    def iter_text(self) -> Iterator[str]:
        """Yield the text in chunks of about 1 MB.

        Raises:
            DataError: the file cannot be read or is not UTF-8; names it and the byte.
        """
        if self.path is None:
            yield self.text
        else:
            yield from decode_utf8(self._read_bytes(self.path), self.path)

    def _read_bytes(self, path: str) -> Iterator[bytes]:
        left = self.size
        try:
            with open(path, "rb") as handle:
                handle.seek(self.byte_offset)
                while left and (chunk := handle.read(min(left, READ_SIZE))):
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise DataError(f"'{path}' could not be read: {error.strerror}.", "Check the file.") from error

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.iter_text())
