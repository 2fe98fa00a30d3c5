"""Files of a path, a pattern or a URL: local ones are walked here, others are listed by fsspec."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from memtx.errors import DataError, MemtxError, missing_package_error

COMPRESSION_BY_SUFFIX = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}  # fsspec's names
MAX_ZSTD_WINDOW_LOG = 31  # of files made with zstd --long=31

# Reasons to leave a file out, as messages have them.
HIDDEN, BROKEN_LINK, SPECIAL = "hidden", "broken links", "no regular files"
READ_ALREADY, COMPRESSED_COPY = "links or paths to what is read already", "compressed copies of files that are read"


@dataclass(frozen=True)
class SourceFile:
    """A file that was found."""

    url: str  # path or URL that opens it
    name: str  # path below the requested folder, without the suffix of a compression
    size: int  # bytes as they are stored
    version: str  # text that changes when the file is rewritten
    is_seekable: bool  # True if reading can start at any byte at no cost
    is_process_local: bool = False  # True if only this process can read it

    @property
    def suffix(self) -> str:
        """Suffix of the name in lower case, such as ``.txt``."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def is_plain(self) -> bool:
        """True for a local file that is not compressed."""
        return self.is_seekable and "://" not in self.url


@dataclass
class Listing:
    """Files of one path, sorted, and those left out by reason."""

    path: str  # as requested
    files: list[SourceFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    is_file: bool = False  # True if the path names one file

    @property
    def label(self) -> str:
        """Last name of the path before any wildcard."""
        return _split_pattern(Path(self.path))[0].name

    def leave_out(self, reason: str, path: str) -> None:
        """Note a path that is not read."""
        self.left_out.setdefault(reason, []).append(path)


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


def get_compression(url: str) -> str | None:
    """Return fsspec's name of the compression of a file, None if its ending is none of one."""
    path = url.partition("::")[0] if "://" in url else url
    return COMPRESSION_BY_SUFFIX.get(PurePosixPath(path).suffix.lower())


@contextlib.contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed; raises DataError for any error of its file system or compression."""
    compression = get_compression(url)
    with convert_errors(f"'{url}' could not be read"), contextlib.ExitStack() as stack:
        if "://" in url:
            import fsspec

            file = stack.enter_context(fsspec.open(url, "rb"))
        else:  # not by fsspec, which takes some letters of a path as a pattern
            file = stack.enter_context(open(url, "rb"))
        yield stack.enter_context(_decompress(file, compression)) if compression else file


def _decompress(file: IO[bytes], compression: str) -> IO[bytes]:
    if compression == "zstd":
        # fsspec's own reader may end at the first frame of several.
        zstd = _import_zstd()
        options = {zstd.DecompressionParameter.window_log_max: MAX_ZSTD_WINDOW_LOG}
        return cast(IO[bytes], zstd.ZstdFile(file, options=options))
    import fsspec

    return cast(IO[bytes], fsspec.compression.compr[compression](file, mode="rb"))


def _import_zstd() -> Any:
    try:
        from compression import zstd  # type: ignore[import-not-found] # Python 3.14
    except ImportError:
        try:
            from backports import zstd  # type: ignore[import-not-found]
        except ImportError as error:
            raise missing_package_error("Reading .zst", error, "data") from error
    return zstd


def list_files(path_or_url: str, seen: set[str] | None = None) -> Listing:
    """List the files of a path, a pattern with ``*``, or a URL of fsspec, sorted by path.

    A folder stands for all files below it, through links too, except hidden ones; ``x.zip`` for its content. Each file
    is listed once. Raises DataError if there is no such path, or it cannot be read.

    Args:
        path_or_url: Path, pattern or URL. A path that exists is no pattern, whatever letters it has.
        seen: Real paths that are read already, which are left out; those listed here are added.
    """
    listing, seen = Listing(path_or_url), set() if seen is None else seen
    path = path_or_url
    for protocol in ("file://", "local://"):
        path = path.removeprefix(protocol)
    with convert_errors(f"'{path_or_url}' could not be listed"):
        if path.lower().endswith(".zip") and "::" not in path and not Path(path).expanduser().is_dir():
            _list_remote(f"zip://::{path}", listing)
        elif "://" in path:
            _list_remote(path, listing)
        else:
            _list_local(Path(path).expanduser(), listing, seen)
    _leave_out_copies(listing)
    return listing


def _exists(path: Path) -> bool:
    """Return whether there is anything at a path, also a broken link."""
    return os.path.lexists(path)


def _split_pattern(path: Path) -> tuple[Path, str]:
    """Return the folder before the first wildcard, and the pattern below it; names that exist are no patterns."""
    folders = [path, *path.parents]
    for folder in reversed(folders):
        if glob.has_magic(folder.name) and not _exists(folder):
            return folder.parent, str(path.relative_to(folder.parent))
    return path, ""


def _list_local(path: Path, listing: Listing, seen: set[str]) -> None:
    if path.is_file():
        listing.is_file = True
        _add_local(path, path.name, listing, seen)
        return
    base, pattern = _split_pattern(path)
    if not pattern:
        if not path.is_dir():
            problem = "is no regular file or folder" if path.exists() else "does not exist"
            raise DataError(f"'{listing.path}' {problem}, expected texts or tables of texts.", "Check the path.")
        _walk(path, listing, seen)
    else:
        for name in sorted(glob.glob(pattern, root_dir=base, recursive=True)):  # noqa: PTH207 (hides hidden files)
            if (base / name).is_dir():
                _walk(base / name, listing, seen, name.rstrip("/"))
            else:
                _add_local(base / name, name, listing, seen)
        if not listing.files and not listing.left_out:
            message = f"'{listing.path}' holds no file: no path matches the pattern."
            raise DataError(message, "Check the path.")
    listing.files.sort(key=lambda file: file.url)


def _walk(root: Path, listing: Listing, seen: set[str], prefix: str = "") -> None:
    """Add the files below a folder: first those that are there, then those behind links."""
    real_root = root.resolve()
    folders, links = [(root, prefix)], list[tuple[Path, str]]()
    while folders or links:
        if not folders:
            path, name = links.pop(0)
            if not path.is_dir():
                _add_local(path, name, listing, seen)
            elif real_root.is_relative_to(path.resolve()):
                listing.leave_out(READ_ALREADY, str(path))  # a link upward, to the folder itself or one around it
            else:
                folders.append((path, name))
            continue
        folder, name = folders.pop()
        if (real := str(folder.resolve())) in seen:
            listing.leave_out(READ_ALREADY, str(folder))
            continue
        seen.add(real)
        for path in sorted(folder.iterdir()):
            entry = f"{name}/{path.name}" if name else path.name
            if path.name.startswith("."):
                listing.leave_out(HIDDEN, str(path))
            elif path.is_symlink():
                links.append((path, entry))
            elif path.is_dir():
                folders.append((path, entry))
            else:
                _add_local(path, entry, listing, seen)


def _add_local(path: Path, name: str, listing: Listing, seen: set[str]) -> None:
    if path.is_symlink() and not path.exists():
        listing.leave_out(BROKEN_LINK, str(path))
    elif not path.is_file():
        listing.leave_out(SPECIAL, str(path))
    elif (real := os.path.realpath(path)) in seen:
        listing.leave_out(READ_ALREADY, str(path))
    else:
        seen.add(real)
        info = path.stat()
        listing.files.append(_make_file(str(path), name, info.st_size, str(info.st_mtime_ns)))


def _make_file(url: str, name: str, size: int, version: str, **flags: bool) -> SourceFile:
    suffix = PurePosixPath(name).suffix.lower()
    is_compressed = suffix in COMPRESSION_BY_SUFFIX
    flags = {"is_seekable": True, **flags}
    flags["is_seekable"] &= not is_compressed
    return SourceFile(url, name[: -len(suffix)] if is_compressed else name, size, version, **flags)


def _list_remote(url: str, listing: Listing) -> None:
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    if filesystem.isfile(path):
        listing.is_file = True
        infos, base = {path: filesystem.info(path)}, path.rpartition("/")[0]
    elif filesystem.isdir(path):
        infos, base = filesystem.find(path, detail=True), path
    elif glob.has_magic(path):
        infos, base = {}, path[: min(path.index(letter) for letter in "*?[" if letter in path)].rpartition("/")[0]
        for match, info in filesystem.glob(path, detail=True).items():
            infos |= filesystem.find(match, detail=True) if info.get("type") == "directory" else {match: info}
    else:
        raise DataError(f"'{listing.path}' does not exist, expected texts or tables of texts.", "Check the path.")
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    _, chained, outer = url.partition("::")
    for file, info in sorted(infos.items()):
        if info.get("type", "file") != "file":
            continue
        file_url = f"{filesystem.unstrip_protocol(file)}::{outer}" if chained else filesystem.unstrip_protocol(file)
        name = file.removeprefix(base).lstrip("/") or PurePosixPath(file).name
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            listing.leave_out(HIDDEN, file_url)
            continue
        versions = [info[key] for key in ("mtime", "ETag", "etag", "LastModified", "created", "CRC") if key in info]
        size, version = int(info.get("size") or 0), str(versions[0]) if versions else ""
        flags = {"is_seekable": not chained, "is_process_local": protocol == "memory" or outer.startswith("memory:")}
        listing.files.append(_make_file(file_url, name, size, version, **flags))


def _leave_out_copies(listing: Listing) -> None:
    """Leave out ``x.txt.gz`` beside ``x.txt``: read twice, a text could be in two splits."""
    names: set[str] = set()
    for file in sorted(listing.files, key=lambda file: get_compression(file.url) is not None):
        if file.name in names:
            listing.leave_out(COMPRESSED_COPY, file.url)
            listing.files.remove(file)
        names.add(file.name)


def describe_left_out(left_out: Mapping[str, Sequence[str]], root: str) -> str:
    """Return the numbers and first paths (below ``root``, if they are) of the files that are left out, by reason."""
    reasons = []
    for reason, paths in left_out.items():
        names = [path.removeprefix(f"{root.rstrip('/')}/") for path in paths[:3]] + ["..."] * (len(paths) > 3)
        reasons.append(f"{len(paths):,} {reason} ({', '.join(names)})")
    return "; ".join(reasons)
