"""Files wherever fsspec finds them: on this machine, behind a URL, in an archive, compressed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from memtx.data.sources.document import READ_SIZE, Document
from memtx.errors import DataError, MemtxError

COMPRESSION_BY_SUFFIX = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Endings of files that are uncompressed as they are read; fsspec's names."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that was found.

    Attributes:
        url: what opens it.
        name: its path below what was asked for, the compression's ending taken off.
        size: bytes as they are stored.
        version: what changes when it is written anew.
        is_seekable: whether it can be read from any byte on at no cost.
        is_process_local: whether this process alone can read it.
    """

    url: str
    name: str
    size: int
    version: str
    is_seekable: bool
    is_process_local: bool

    @property
    def suffix(self) -> str:
        """The ending of its name, such as ``.txt``."""
        return PurePosixPath(self.name).suffix.lower()


@contextlib.contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, uncompressed.

    Raises:
        DataError: it cannot be opened or read, by whatever its file system or its compression says.
    """
    import fsspec

    try:
        with fsspec.open(url, "rb", compression=COMPRESSION_BY_SUFFIX.get(PurePosixPath(url).suffix.lower())) as handle:
            yield handle
    except MemtxError:
        raise
    except Exception as error:  # each file system and each compression has errors of its own
        raise DataError(
            f"'{url}' could not be read: {_format_error(error)}.", "Check it, and the access to it."
        ) from error


def list_files(path_or_url: str) -> list[RemoteFile]:
    """List the files of a path, a pattern with ``*``, or a URL of fsspec, in the order of their names.

    A folder stands for all files below it but hidden ones, ``x.zip`` for what is in it.

    Raises:
        DataError: there is nothing, or the file system cannot be asked.
    """
    import fsspec

    url = f"zip://::{path_or_url}" if path_or_url.lower().endswith(".zip") and "::" not in path_or_url else path_or_url
    try:
        system, path = fsspec.core.url_to_fs(url)
        if any(letter in path for letter in "*?["):
            found = system.glob(path, detail=True)
            base = path[: min(path.index(letter) for letter in "*?[" if letter in path)].rpartition("/")[0]
        elif system.isdir(path):
            found, base = system.find(path, detail=True), path
        elif system.exists(path):
            found, base = {path: system.info(path)}, path.rstrip("/").rpartition("/")[0]
        else:
            found, base = {}, path
        places = [
            _make_remote_file(system, url, base, name, facts)
            for name, facts in sorted(found.items())
            if facts.get("type", "file") == "file"
        ]
    except Exception as error:  # as above; a package for the protocol may be missing as well
        raise DataError(
            f"'{path_or_url}' could not be listed: {_format_error(error)}.", "Check it, and the access to it."
        ) from error
    places = [one for one in places if not any(part.startswith(".") for part in PurePosixPath(one.name).parts)]
    if not places:
        raise DataError(f"'{path_or_url}' holds no file, expected texts or tables of texts.", "Check the path.")
    return places


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


def _format_error(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class RemoteDocument(Document):
    """A text that is a file of its own, read to its end wherever it is; ``size`` is what is stored.

    Attributes:
        version: what changes when it is written anew.
        is_process_local: whether this process alone can read it.
    """

    version: str = ""
    is_process_local: bool = False

    @property
    def cache_key(self) -> str:
        """Name, place, size and version of the file."""
        return f"{self.id}:{self.path}:{self.size}:{self.version}"

    def _read_bytes(self, path: str) -> Iterator[bytes]:
        with open_file(path) as handle:
            while chunk := handle.read(READ_SIZE):
                yield chunk
