"""Files wherever fsspec finds them: on this machine, behind a URL, in an archive, compressed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

from memtx.data.sources.base import READ_SIZE, Document
from memtx.errors import DataError, MemtxError

COMPRESSION_BY_SUFFIX = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""fsspec's names of the compressions that are undone while reading, by file suffix."""

ACCESS_HINT = "Check it, and the access to it."


@dataclass(frozen=True)
class RemoteFile:
    """A file that was found.

    Attributes:
        url: Path or URL that opens it.
        name: Path below the requested folder, without the suffix of a compression.
        size: Bytes as they are stored.
        version: Text that changes when the file is written anew.
        is_seekable: True if reading can start at any byte at no cost.
        is_process_local: True if only this process can read it.
    """

    url: str
    name: str
    size: int
    version: str
    is_seekable: bool
    is_process_local: bool

    @property
    def suffix(self) -> str:
        """Suffix of the name in lower case, such as ``.txt``."""
        return PurePosixPath(self.name).suffix.lower()


@contextlib.contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed.

    Raises:
        DataError: Its file system or its compression raised any error in opening or reading.
    """
    import fsspec

    try:
        with fsspec.open(url, "rb", compression=COMPRESSION_BY_SUFFIX.get(PurePosixPath(url).suffix.lower())) as file:
            yield file
    except MemtxError:
        raise
    except Exception as error:  # every file system and compression has its own errors
        raise DataError(f"'{url}' could not be read: {describe_error(error)}.", ACCESS_HINT) from error


def list_files(path_or_url: str) -> list[RemoteFile]:
    """List the files of a path, a pattern with ``*``, or a URL of fsspec, sorted by path.

    A folder stands for all files below it except hidden ones, ``x.zip`` for its content.

    Raises:
        DataError: There is no file, or the file system cannot be read.
    """
    import fsspec

    url = f"zip://::{path_or_url}" if path_or_url.lower().endswith(".zip") and "::" not in path_or_url else path_or_url
    try:
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
        files = [
            _make_remote_file(filesystem, url, base, file, info)
            for file, info in sorted(infos.items())
            if info.get("type", "file") == "file"
        ]
    except Exception as error:  # as above; the package of a protocol may be missing as well
        raise DataError(f"'{path_or_url}' could not be listed: {describe_error(error)}.", ACCESS_HINT) from error
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


def describe_error(error: Exception) -> str:
    """Return the type and text of another library's error on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@dataclass(frozen=True)
class RemoteDocument(Document):
    """A text that is a whole file anywhere; ``size`` is its stored size.

    Attributes:
        version: Text that changes when the file is written anew.
        is_process_local: True if only this process can read it.
    """

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
