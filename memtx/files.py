"""Atomic files: written to a temporary path, synced, renamed, and checked when read.

Tensors are stored as safetensors, never as pickle, with the file's kind and version in the header.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from memtx.errors import CheckpointError, MemtxError

_TEMPORARY_PATTERN = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")

DISK_FULL_HINT = "Free some space; existing files are unchanged, and a run resumes from its last checkpoint."


def default_cache_dir() -> Path:
    """Return ``~/.cache/memtx``, the default folder for files that can be recomputed."""
    return Path("~/.cache/memtx").expanduser()


def is_disk_full(error: OSError) -> bool:
    """Return whether a full disk or an exhausted quota caused the error."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power failure (a folder's entries are synced separately)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a random temporary path beside ``path``, so that processes do not collide."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_failed_error(path: Path, error: OSError) -> MemtxError:
    """Return the error for a ``path`` that could not be written."""
    hint = DISK_FULL_HINT if is_disk_full(error) else "Check the folder, its permissions and the free space."
    return MemtxError(f"'{path}' could not be written: {error.strerror or error}.", hint)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it is synced and renamed on success, else removed.

    Raises MemtxError if the folder cannot be written.
    """
    target = Path(path)
    temporary = temporary_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        fsync_directory(target.parent)
    except OSError as error:
        raise write_failed_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_temporary_files(directory: Path) -> None:
    """Remove temporary files that a killed process left in ``directory``, where no process may be writing."""
    for path in directory.glob(".*.tmp"):
        if _TEMPORARY_PATTERN.fullmatch(path.name):
            remove(path)


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary handle whose content appears under ``path`` only if the block succeeds."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        yield handle


def replace(source: Path, target: Path) -> None:
    """Replace ``target``, if it exists, by ``source``; either may be a file or a folder.

    ``source`` must be in the same folder, with its files synced. A single rename cannot replace a folder, so the old
    content is first moved aside; see :func:`recover`.
    """
    backup = _backup_path(target)
    recover(target)
    remove(backup)
    if source.is_dir():
        fsync_directory(source)
    if target.exists():
        target.rename(backup)
    source.rename(target)
    fsync_directory(target.parent)
    remove(backup)


def recover(path: Path) -> None:
    """Restore the content that an interrupted :func:`replace` moved aside."""
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):
            _backup_path(path).rename(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; do nothing if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _backup_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_open(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return ``value`` as indented JSON."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raises MemtxError if the file is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise MemtxError(f"'{path}' does not exist.", "Check the path.") from error
    except OSError as error:
        raise MemtxError(f"'{path}' could not be read: {error.strerror}.", "Check the path.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemtxError(f"'{path}' is not valid JSON: {error}.", "Restore it or write it again.") from error


def checksum(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, kind: str, version: int, **extra_metadata: str
) -> None:
    """Write a safetensors file with a kind, a version and other metadata; raises MemtxError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", "kind": kind, "version": str(version), **extra_metadata}
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # save_file makes the file readable by its owner only; restore the mode that the umask gives other files.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(content, str(temporary), metadata=metadata)
        except SafetensorError as error:  # raised for a full disk or a folder without permission
            # The temporary file's name would mislead.
            raise OSError(str(error).partition(" at path")[0]) from error
        temporary.chmod(mode)


def load_tensors(
    path: str | os.PathLike[str], *, kind: str, version: int, header_only: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors (on the CPU; none if ``header_only``) and the header of a file of :func:`save_tensors`.

    Raises CheckpointError if the file is missing, damaged, or of another kind or version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"'{path}' does not exist.", "Check the path.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            # Copied to torch's own alignment: matrix products round differently on a view into the file, and a loaded
            # state must continue bit for bit.
            tensors = {name: handle.get_tensor(name).clone() for name in (() if header_only else handle.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        message = f"'{path}' is not a valid safetensors file: {error}."
        raise CheckpointError(message, "Restore it from a copy or write it again.") from error
    if metadata.get("kind") != kind:
        message = f"'{path}' holds '{metadata.get('kind', 'something unnamed')}', expected '{kind}'."
        raise CheckpointError(message, "Check the path.")
    if metadata.get("version") != str(version):
        message = f"'{path}' has format version {metadata.get('version')}, this release reads {version}."
        raise CheckpointError(message, "Use the release that wrote it, or write it again.")
    return tensors, metadata
