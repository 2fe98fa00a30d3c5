"""A folder of sessions: one file each, named by the pool and never by a caller; one pool at a time."""

from __future__ import annotations

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
from memtx.inference.sessions.file import (
    KIND,
    VERSION,
    Fingerprints,
    check_fingerprints,
    load_session,
    parse_header,
    save_session,
)

SUFFIX = ".session"
SESSION_ID_PATTERN = re.compile(r"[0-9a-f]{32}")
LOCK_FILE = ".lock"


class SessionSaveError(MemtxError):
    """A session cannot be written."""


class SessionStore:
    """Where sessions wait on disk.

    Args:
        folder: made where it is not there.
        fingerprints: whose sessions they are.

    Raises:
        MemtxError: the folder cannot be used, or another pool uses it.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprints: Fingerprints) -> None:
        self.folder = Path(folder)
        self.fingerprints = fingerprints
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Sessions hold what their readers read: they are their owner's alone.
            self._lock = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise MemtxError(
                f"The folder '{self.folder}' cannot be used: {error.strerror}.", "Check its permissions."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise MemtxError(
                f"The folder '{self.folder}' is used by another server.", "Give each a folder of its own."
            ) from error
        for left in self.folder.glob(f".*{SUFFIX}.*.tmp"):
            left.unlink(missing_ok=True)  # Of a process that was killed while it wrote.

    def close(self) -> None:
        """Let another pool have the folder."""
        os.close(self._lock)

    def path(self, session_id: str) -> Path:
        """Return the file of a session."""
        assert SESSION_ID_PATTERN.fullmatch(session_id), "names are the pool's own"
        return self.folder / f"{session_id}{SUFFIX}"

    def iter_sessions(self) -> Iterator[tuple[str, Totals, dict[str, Any]]]:
        """Yield id, sums and metadata of the sessions that are here; files of another model are passed over."""
        for file in sorted(self.folder.glob(f"*{SUFFIX}")):
            name = file.name.removesuffix(SUFFIX)
            if SESSION_ID_PATTERN.fullmatch(name) and file.is_file() and not file.is_symlink():
                try:
                    header = files.load_header(file, kind=KIND, version=VERSION)
                    check_fingerprints(file, header, self.fingerprints)
                    yield name, *parse_header(header)
                except (CheckpointError, KeyError, TypeError, ValueError, RecursionError):
                    continue

    def save(self, session_id: str, reader: StreamReader, metadata: dict[str, Any]) -> None:
        """Write a session; when this returns it survives a power cut.

        Raises:
            SessionSaveError: it cannot be written.
        """
        try:
            save_session(self.path(session_id), reader, metadata=metadata, fingerprints=self.fingerprints)
        except MemtxError as error:
            raise SessionSaveError(
                error.message.replace(f"'{self.path(session_id)}'", "The session"), error.hint
            ) from error

    def load(self, session_id: str, reader: StreamReader) -> None:
        """Bring a reader to where a session stands.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        self._load(self.path(session_id), reader)

    def import_session(self, data: bytes, reader: StreamReader) -> None:
        """Bring a reader to where the session of a file's content stands.

        Raises:
            CheckpointError: it is damaged, or of another model or tokenizer.
        """
        file = self.folder / f".{secrets.token_hex(16)}{SUFFIX}.in.tmp"
        try:
            file.write_bytes(data)
            self._load(file, reader)
        finally:
            file.unlink(missing_ok=True)

    def _load(self, file: Path, reader: StreamReader) -> None:
        try:
            load_session(file, reader, fingerprints=self.fingerprints)
        except CheckpointError as error:
            # Where sessions are kept is nothing that a caller needs to know.
            raise CheckpointError(error.message.replace(f"'{file}'", "The session"), error.hint) from error

    def delete(self, session_id: str) -> None:
        """Remove a session's file, if it has one; when this returns it stays away after a power cut."""
        try:
            self.path(session_id).unlink()
        except FileNotFoundError:
            return
        files.fsync_directory(self.folder)
