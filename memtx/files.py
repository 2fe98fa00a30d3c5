"""Files that are whole or not there: written to a temporary name, synced, renamed; read with a check.

Tensors travel as safetensors, never as pickle. Every file of ours says its format in the header.
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

DISK_FULL_HINT = "Free some space; what was there is as it was, and a run goes on from its last checkpoint."


def default_cache_dir() -> Path:
    """Return ``~/.cache/memtx``, where what can be made again goes unless another folder is given."""
    return Path("~/.cache/memtx").expanduser()


def is_disk_full(error: OSError) -> bool:
    """Return whether an error says that a disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def fsync_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut (a folder's entries have their own sync)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return a name beside ``path`` to write under; random, so that two processes do not share one."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_failed_error(path: Path, error: OSError) -> MemtxError:
    """Return the error that says why ``path`` could not be written, and what to do."""
    cure = DISK_FULL_HINT if is_disk_full(error) else "Check the folder, its permissions and the free space."
    return MemtxError(f"'{path}' could not be written: {error.strerror or error}.", cure)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is synced and renamed, else removed.

    Raises:
        MemtxError: the folder cannot be written to.
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
    """Remove what a process left half-written in ``directory`` when it was killed; nobody may be writing there."""
    for path in directory.glob(".*.tmp"):
        if _TEMPORARY_PATTERN.fullmatch(path.name):
            remove(path)


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a binary handle whose content appears under ``path`` only when the block ends well."""
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        yield handle


def replace(source: Path, target: Path) -> None:
    """Put a folder in the place of what is there, a folder or a file; or a file in the place of a folder.

    There is no such rename in one, so what was there steps aside for a moment; see :func:`recover`.

    Args:
        source: what takes the place, beside it, with its files synced.
        target: the place.
    """
    aside = _backup_path(target)
    recover(target)
    remove(aside)
    if source.is_dir():
        fsync_directory(source)
    if target.exists():
        target.rename(aside)
    source.rename(target)
    fsync_directory(target.parent)
    remove(aside)


def recover(path: Path) -> None:
    """Put back what :func:`replace` moved aside, where it was stopped before the new one was in its place."""
    if not path.exists():
        with contextlib.suppress(FileNotFoundError):
            _backup_path(path).rename(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _backup_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_open(path) as handle:
        handle.write(text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        MemtxError: the file is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise MemtxError(f"'{path}' does not exist.", "Check the path.") from error
    except OSError as error:
        raise MemtxError(f"'{path}' could not be read: {error.strerror}.", "Check the path.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MemtxError(f"'{path}' is not valid JSON: {error}.", "Restore it or write it again.") from error


def checksum(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, kind: str, version: int, **extra_metadata: str
) -> None:
    """Write tensors as one safetensors file whose header names its kind, version and further facts.

    Raises:
        MemtxError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", "kind": kind, "version": str(version), **extra_metadata}
    content = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # It makes a file for its owner alone: the mode is to be what the umask says, as of every other file.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(content, str(temporary), metadata=metadata)
        except SafetensorError as error:  # its own name for a full disk or a folder that is closed to us
            # Without the names of temporary files, which are gone by now.
            raise OSError(str(error).partition(" at path")[0]) from error
        temporary.chmod(mode)


def load_tensors(path: str | os.PathLike[str], *, kind: str, version: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a file of :func:`save_tensors`: its tensors (on the CPU) and its header.

    Raises:
        CheckpointError: missing, damaged, of another kind, or of a version this release does not read.
    """
    return _read_tensors(path, kind, version, with_tensors=True)


def load_header(path: str | os.PathLike[str], *, kind: str, version: int) -> dict[str, str]:
    """Read the header of a file of :func:`save_tensors` alone; raises what :func:`load_tensors` raises."""
    return _read_tensors(path, kind, version, with_tensors=False)[1]


def _read_tensors(
    path: str | os.PathLike[str], kind: str, version: int, with_tensors: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise CheckpointError(f"'{path}' does not exist.", "Check the path.")
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            # Copied to memory of torch's own alignment: products round otherwise on a view into the file, and what is
            # loaded is to go on bit for bit.
            names = handle.keys() if with_tensors else []
            found = {name: handle.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is not a whole safetensors file: {error}.", "Restore it from a copy or write it again."
        ) from error
    if metadata.get("kind") != kind:
        raise CheckpointError(
            f"'{path}' holds '{metadata.get('kind', 'something unnamed')}', expected '{kind}'.",
            "Give the file that belongs here.",
        )
    if metadata.get("version") != str(version):
        raise CheckpointError(
            f"'{path}' has format version {metadata.get('version')}, this release reads {version}.",
            "Use the release that wrote it, or write it again.",
        )
    return found, metadata
