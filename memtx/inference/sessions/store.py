"""Session store: a folder with one file per session, used by one pool at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memtx import files
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.reader import StreamReader, Totals
from memtx.inference.sessions.file import Fingerprints, load_header, load_session, save_session

SUFFIX = ".session"
SESSION_ID_PATTERN = re.compile(r"[0-9a-f]{32}")


class SessionSaveError(MemtxError):
    """A session cannot be written."""


class SessionStore:
    """Sessions on disk, in a folder that is created if it does not exist.

    Raises MemtxError if the folder cannot be used, or another pool uses it.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprints: Fingerprints) -> None:
        self.folder, self.fingerprints = Path(folder), fingerprints
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Sessions hold private text: only their owner may read them.
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            message = f"The folder '{self.folder}' cannot be used: {error.strerror}."
            raise MemtxError(message, "Check its permissions.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            message = f"The folder '{self.folder}' is used by another server."
            raise MemtxError(message, "Give each server its own folder.") from error
        for leftover in self.folder.glob(f".*{SUFFIX}.*.tmp"):
            leftover.unlink(missing_ok=True)  # From a process killed while writing.

    def close(self) -> None:
        """Release the folder for another pool."""
        os.close(self._lock)

    def path(self, session_id: str) -> Path:
        """Return the file of a session."""
        assert SESSION_ID_PATTERN.fullmatch(session_id), "session ids come from the registry"
        return self.folder / f"{session_id}{SUFFIX}"

    def iter_sessions(self) -> Iterator[tuple[str, Totals, dict[str, Any]]]:
        """Yield id, totals and metadata of each session; files of other models are skipped."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            session_id = path.name.removesuffix(SUFFIX)
            if SESSION_ID_PATTERN.fullmatch(session_id) and path.is_file() and not path.is_symlink():
                with contextlib.suppress(CheckpointError):
                    yield session_id, *load_header(path, self.fingerprints)

    def save(self, session_id: str, reader: StreamReader, metadata: dict[str, Any]) -> None:
        """Write a session so that it survives a power failure; raises SessionSaveError."""
        path = self.path(session_id)
        try:
            save_session(path, reader, metadata=metadata, fingerprints=self.fingerprints)
        except MemtxError as error:
            raise SessionSaveError(error.message.replace(f"'{path}'", "The session"), error.hint) from error

    def load(self, session_id: str, reader: StreamReader) -> None:
        """Restore a reader from a session; raises CheckpointError if its file is missing or damaged."""
        self._load(self.path(session_id), reader)

    def import_session(self, data: bytes, reader: StreamReader) -> None:
        """Restore a reader from the bytes of a session file; raises like ``load_session``."""
        path = self.folder / f".{secrets.token_hex(16)}{SUFFIX}.in.tmp"
        try:
            path.write_bytes(data)
            self._load(path, reader)
        finally:
            path.unlink(missing_ok=True)

    def _load(self, path: Path, reader: StreamReader) -> None:
        try:
            load_session(path, reader, fingerprints=self.fingerprints)
        except CheckpointError as error:
            # Do not expose the server's paths.
            raise CheckpointError(error.message.replace(f"'{path}'", "The session"), error.hint) from error

    def delete(self, session_id: str) -> None:
        """Remove the file of a session, if it exists, so that it stays removed after a power failure."""
        try:
            self.path(session_id).unlink()
        except FileNotFoundError:
            return
        files.fsync_directory(self.folder)
