"""Sources of text: documents, their parts and splits, and files wherever fsspec finds them."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from memtx.data.text_chunks import decode_utf8
from memtx.errors import DataError, MemtxError, closest_match

COMPRESSION_BY_SUFFIX = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
READ_SIZE = 1 << 20  # bytes of a file read at once
SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {**{name: name for name in SPLITS}, "valid": "validation", "val": "validation", "dev": "validation"}


class SourcePart(ABC):
    """A part of a source that one process reads: a file, a byte range of lines, some rows of a table.

    Subclasses are frozen dataclasses of plain values, so that a worker process can be sent one.
    """

    size: int  # bytes in the source (compressed bytes of a compressed one), for planning and progress

    @property
    def is_process_local(self) -> bool:
        """True if only this process can read it, such as a file system in memory."""
        return False

    @property
    @abstractmethod
    def cache_key(self) -> str:
        """Text that changes when the part does, as far as can be told without reading it."""

    @abstractmethod
    def iter_documents(self) -> Iterator[Document]:
        """Yield whole documents in a fixed order; read each before asking for the next.

        Raises DataError with the name of a part that cannot be read, and the position in it.
        """


@dataclass(frozen=True)
class Document(SourcePart):
    """One text, not read yet."""

    id: str  # unique within the split
    title: str  # display name; the id where nothing better is known
    size: int  # bytes of UTF-8
    path: str | None = None  # file, or None if `text` holds the text
    byte_offset: int = 0  # where the document begins in the file
    text: str = ""
    is_table_row: bool = False  # a row of a table is skipped if it has no word

    @property
    def cache_key(self) -> str:
        """Id, offset, size and modification time of the file, or a hash of the text."""
        if self.path is None:
            return f"{self.id}:{hashlib.sha256(self.text.encode()).hexdigest()}"
        return f"{self.id}:{self.byte_offset}:{self.size}:{Path(self.path).stat().st_mtime_ns}"

    def iter_documents(self) -> Iterator[Document]:
        """Yield the document itself."""
        yield self

    def iter_text(self) -> Iterator[str]:
        """Yield portions of about 1 MB; raises DataError with the unreadable file, or the byte that is not UTF-8."""
        if self.path is None:
            yield self.text
        else:
            yield from decode_utf8(self._read_bytes(self.path), self.path)

    def _read_bytes(self, path: str) -> Iterator[bytes]:
        remaining = self.size
        try:
            with open(path, "rb") as file:
                file.seek(self.byte_offset)
                while remaining and (block := file.read(min(remaining, READ_SIZE))):
                    remaining -= len(block)
                    yield block
        except OSError as error:
            raise DataError(f"'{path}' could not be read: {error.strerror}.", "Check the file.") from error

    def read(self) -> str:
        """Return the whole text."""
        return "".join(self.iter_text())


@dataclass(frozen=True)
class CorpusManifest:
    """All parts of a source, and the split of each document."""

    name: str  # for messages
    # Parts of each split, where the source has splits; in a fixed order.
    split_parts: Mapping[str, Sequence[SourcePart]] = field(default_factory=dict)
    # Parts whose documents are assigned to splits by their ids, and the fraction of each split: positive, adding to 1.
    unsplit_parts: Sequence[SourcePart] = ()
    split_fractions: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits that may have documents: train, validation, test, then others."""
        present = {split for split, parts in self.split_parts.items() if parts}
        if self.unsplit_parts:
            present |= set(self.split_fractions)
        names = dict.fromkeys((*SPLITS, *self.split_parts, *self.split_fractions))
        return tuple(split for split in names if split in present)

    def iter_parts(self) -> Iterator[tuple[SourcePart, Mapping[str, float]]]:
        """Yield every part with the split fractions of its documents."""
        for split in self.splits:
            yield from ((part, {split: 1.0}) for part in self.split_parts.get(split, ()))
        yield from ((part, self.split_fractions) for part in self.unsplit_parts)


@dataclass(frozen=True)
class Corpus(CorpusManifest):
    """A manifest whose parts are documents, each in one split."""

    split_parts: Mapping[str, Sequence[Document]] = field(default_factory=dict)

    def get_split(self, split: str) -> Sequence[Document]:
        """Return the documents of a split; raises DataError if there is no such split."""
        if split not in self.splits:
            raise DataError(
                f"'{self.name}' has no split '{split}', it has {', '.join(self.splits) or 'none'}."
                f"{closest_match(split, self.splits)}",
                f"Add a folder '{split}' with one .txt a document, or choose another split.",
            )
        return self.split_parts[split]


def assign_split(document_id: str, split_fractions: Mapping[str, float]) -> str:
    """Return the split of a document, a function of its id and the split fractions alone."""
    *first_splits, last = split_fractions
    if not first_splits:
        return last
    digest = hashlib.sha256(document_id.encode("utf-8", "surrogatepass")).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    for split in first_splits:
        fraction -= split_fractions[split]
        if fraction < 0:
            return split
    return last


class TextSource(ABC):
    """A configurable source of text, scanned when it is needed."""

    @abstractmethod
    def scan(self) -> CorpusManifest:
        """List the parts; raises DataError if nothing is there, or it cannot be read."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that was found."""

    url: str  # path or URL that opens it
    name: str  # path below the requested folder, without the suffix of a compression
    size: int  # bytes as they are stored
    version: str  # text that changes when the file is rewritten
    is_seekable: bool  # True if reading can start at any byte at no cost
    is_process_local: bool  # True if only this process can read it

    @property
    def suffix(self) -> str:
        """Suffix of the name in lower case, such as ``.txt``."""
        return PurePosixPath(self.name).suffix.lower()


@contextlib.contextmanager
def convert_errors(failure: str, hint: str = "Check it, and the access to it.") -> Iterator[None]:
    """Raise any error of another library as DataError: each file system, compression and format has its own types."""
    try:
        yield
    except MemtxError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}".removesuffix(": ")
        raise DataError(f"{failure}: {reason}.", hint) from error


@contextlib.contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed; raises DataError for any error of its file system or compression."""
    import fsspec

    compression = COMPRESSION_BY_SUFFIX.get(PurePosixPath(url).suffix.lower())
    with convert_errors(f"'{url}' could not be read"), fsspec.open(url, "rb", compression=compression) as file:
        yield file


def list_files(path_or_url: str) -> list[RemoteFile]:
    """List the files of a path, a pattern with ``*``, or a URL of fsspec, sorted by path.

    A folder stands for all files below it except hidden ones, ``x.zip`` for its content. Raises DataError if there is
    no file, or the file system cannot be read.
    """
    import fsspec

    url = f"zip://::{path_or_url}" if path_or_url.lower().endswith(".zip") and "::" not in path_or_url else path_or_url
    with convert_errors(f"'{path_or_url}' could not be listed"):
        filesystem, path = fsspec.core.url_to_fs(url)
        wildcards = [index for index, letter in enumerate(path) if letter in "*?["]
        if wildcards:
            infos, base = filesystem.glob(path, detail=True), path[: wildcards[0]].rpartition("/")[0]
        elif filesystem.isdir(path):
            infos, base = filesystem.find(path, detail=True), path
        elif filesystem.exists(path):
            infos, base = {path: filesystem.info(path)}, path.rstrip("/").rpartition("/")[0]
        else:
            infos, base = {}, path
        infos = {file: info for file, info in sorted(infos.items()) if info.get("type", "file") == "file"}
        files = [_make_remote_file(filesystem, url, base, file, info) for file, info in infos.items()]
    files = [file for file in files if not any(part.startswith(".") for part in PurePosixPath(file.name).parts)]
    if not files:
        raise DataError(f"'{path_or_url}' holds no file, expected texts or tables of texts.", "Check the path.")
    return files


def _make_remote_file(filesystem: Any, pattern: str, base: str, path: str, info: dict[str, Any]) -> RemoteFile:
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    _, chained, outer = pattern.partition("::")
    url = path if protocol in ("file", "local") else filesystem.unstrip_protocol(path)
    suffix = PurePosixPath(path).suffix.lower()
    name = path.removeprefix(base).lstrip("/") or PurePosixPath(path).name
    if suffix in COMPRESSION_BY_SUFFIX:
        name = name[: -len(suffix)]
    versions = [info[key] for key in ("mtime", "ETag", "etag", "LastModified", "created", "CRC") if key in info]
    return RemoteFile(
        f"{url}::{outer}" if chained else url,
        name,
        int(info.get("size") or 0),
        str(versions[0]) if versions else "",
        is_seekable=not chained and suffix not in COMPRESSION_BY_SUFFIX,
        is_process_local=protocol == "memory" or outer.startswith("memory:"),
    )


@dataclass(frozen=True)
class RemoteDocument(Document):
    """A text that is a whole file anywhere; ``size`` is its stored size, ``version`` changes with the file."""

    version: str = ""
    is_process_local: bool = False

    @property
    def cache_key(self) -> str:
        """Id, path, size and version of the file."""
        return f"{self.id}:{self.path}:{self.size}:{self.version}"

    def _read_bytes(self, path: str) -> Iterator[bytes]:
        with open_file(path) as file:
            while block := file.read(READ_SIZE):
                yield block
