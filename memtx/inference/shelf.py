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
from memtx.inference.session import KIND, VERSION, Identity, check_identity, header_facts, load_session, save_session

ENDING = ".session"
NAME = re.compile(r"[0-9a-f]{32}")
LOCK = ".lock"


class UnsavedError(MemtxError):
    """A session cannot be written."""


class Shelf:
    """Where sessions wait on disk.

    Args:
        folder: made where it is not there.
        identity: whose sessions they are.

    Raises:
        MemtxError: the folder cannot be used, or another pool uses it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Identity) -> None:
        self.folder = Path(folder)
        self.identity = identity
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Sessions hold what their readers read: they are their owner's alone.
            self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
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
        for left in self.folder.glob(f".*{ENDING}.*.tmp"):
            left.unlink(missing_ok=True)  # Of a process that was killed while it wrote.

    def close(self) -> None:
        """Let another pool have the folder."""
        os.close(self._lock)

    def path(self, name: str) -> Path:
        """Return the file of a session."""
        assert NAME.fullmatch(name), "names are the pool's own"
        return self.folder / f"{name}{ENDING}"

    def sessions(self) -> Iterator[tuple[str, Totals, dict[str, Any]]]:
        """Yield name, sums and facts of the sessions that are here; files of another model are passed over."""
        for file in sorted(self.folder.glob(f"*{ENDING}")):
            name = file.name.removesuffix(ENDING)
            if NAME.fullmatch(name) and file.is_file() and not file.is_symlink():
                try:
                    header = files.load_header(file, kind=KIND, version=VERSION)
                    check_identity(file, header, self.identity)
                    yield name, *header_facts(header)
                except (CheckpointError, KeyError, TypeError, ValueError, RecursionError):
                    continue

    def save(self, name: str, reader: StreamReader, facts: dict[str, Any]) -> None:
        """Write a session; when this returns it survives a power cut.

        Raises:
            UnsavedError: it cannot be written.
        """
        try:
            save_session(self.path(name), reader, facts=facts, identity=self.identity)
        except MemtxError as error:
            raise UnsavedError(error.what.replace(f"'{self.path(name)}'", "The session"), error.cure) from error

    def load(self, name: str, reader: StreamReader) -> None:
        """Bring a reader to where a session stands.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        self._load(self.path(name), reader)

    def take_in(self, content: bytes, reader: StreamReader) -> None:
        """Bring a reader to where the session of a file's content stands.

        Raises:
            CheckpointError: it is damaged, or of another model or tokenizer.
        """
        file = self.folder / f".{secrets.token_hex(16)}{ENDING}.in.tmp"
        try:
            file.write_bytes(content)
            self._load(file, reader)
        finally:
            file.unlink(missing_ok=True)

    def _load(self, file: Path, reader: StreamReader) -> None:
        try:
            load_session(file, reader, identity=self.identity)
        except CheckpointError as error:
            # Where sessions are kept is nothing that a caller needs to know.
            raise CheckpointError(error.what.replace(f"'{file}'", "The session"), error.cure) from error

    def delete(self, name: str) -> None:
        """Remove a session's file, if it has one; when this returns it stays away after a power cut."""
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return
        files.sync_folder(self.folder)
