"""Session registry: all sessions of a pool by id, their locks, and the eviction of idle sessions to disk."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from memtx.errors import MemtxError, check_at_least
from memtx.inference.deadline import acquire_before
from memtx.inference.reader import StreamReader, Totals
from memtx.inference.sessions.store import SESSION_ID_PATTERN, SessionStore


class SessionNotFoundError(MemtxError):
    """A session id is unknown."""

    def __init__(self, session_id: str) -> None:
        # Strings that are not ids are not echoed.
        name = f" '{session_id}'" if SESSION_ID_PATTERN.fullmatch(session_id) else ""
        super().__init__(f"The session{name} does not exist.", "Create one; a deleted session cannot be restored.")


class SessionLimitError(MemtxError):
    """The maximum number of sessions is reached."""


@dataclass(frozen=True)
class SessionInfo:
    """Description of a session, as of its last request.

    ``session_id`` has 32 hexadecimal digits, ``created`` is in Unix seconds, ``is_saved`` if its file is current.
    ``num_turns`` counts the answers of the model in a conversation.
    """

    session_id: str
    created: float
    totals: Totals
    in_memory: bool
    is_saved: bool
    num_turns: int = 0


@dataclass
class Session:
    """A session; ``reader`` is None while it is on disk. Hold ``lock`` to access it."""

    info: SessionInfo
    reader: StreamReader | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_deleted: bool = False


class SessionRegistry:
    """All sessions of a pool: at most ``max_sessions``, with at most ``max_in_memory`` in memory if there is a store.

    ``reader_factory`` creates a reader at the beginning of a text.
    """

    def __init__(
        self,
        reader_factory: Callable[[], StreamReader],
        store: SessionStore | None,
        *,
        max_in_memory: int,
        max_sessions: int,
    ) -> None:
        check_at_least(1, max_in_memory=max_in_memory, max_sessions=max_sessions)
        self.max_in_memory, self.max_sessions = max_in_memory, max_sessions
        self._reader_factory, self._store = reader_factory, store
        self._lock = threading.Lock()
        # Least recently used first.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        for session_id, totals, metadata in store.iter_sessions() if store is not None else ():
            created = metadata["created"] if isinstance(metadata.get("created"), float) else 0.0
            num_turns = turns if type(turns := metadata.get("turns")) is int else 0
            info = SessionInfo(session_id, created, totals, False, True, num_turns)
            self._sessions[session_id] = Session(info, None)

    @property
    def store(self) -> SessionStore:
        """Store of saved sessions; raises MemtxError without one."""
        if self._store is None:
            raise MemtxError("The pool has no folder to save sessions in.", "Create it with a folder.")
        return self._store

    @property
    def counts(self) -> dict[str, int]:
        """Number of sessions ``in_memory`` and in ``total``."""
        sessions = self.list_sessions()
        return {"in_memory": sum(session.reader is not None for session in sessions), "total": len(sessions)}

    def list_sessions(self) -> list[Session]:
        """Return all sessions, least recently used first."""
        with self._lock:
            return list(self._sessions.values())

    def get(self, session_id: str) -> Session:
        """Return a session; raises SessionNotFoundError."""
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def check_limit(self) -> None:
        """Raise SessionLimitError if there are ``max_sessions`` sessions."""
        if len(self._sessions) >= self.max_sessions:
            raise SessionLimitError(f"Session limit reached ({self.max_sessions}).", "Delete a session or retry later.")

    def add(self, reader: StreamReader, num_turns: int = 0) -> str:
        """Add a session at the position of a reader and return its id; raises SessionLimitError."""
        session_id = secrets.token_hex(16)
        info = SessionInfo(session_id, time.time(), reader.totals, True, False, num_turns)
        with self._lock:
            self.check_limit()
            self._sessions[session_id] = Session(info, reader)
        self._evict_idle()
        return session_id

    @contextlib.contextmanager
    def acquire(self, session_id: str, deadline: float | None = None) -> Iterator[tuple[Session, StreamReader]]:
        """Hold a session exclusively, with its state in memory.

        Raises:
            SessionNotFoundError: The session does not exist.
            DeadlineExceededError: The session is busy until the deadline.
            CheckpointError: The file of the session is damaged.
        """
        session = self.get(session_id)
        with _locked(session, deadline):
            reader = session.reader
            if reader is None:
                self.store.load(session_id, reader := self._reader_factory())
                session.reader, session.info = reader, replace(session.info, in_memory=True)
            with self._lock:
                self._sessions.move_to_end(session_id)
            yield session, reader
        self._evict_idle()

    def update(self, session: Session, reader: StreamReader, *, save: bool, num_new_turns: int = 0) -> None:
        """Move a session that the caller holds to the position of ``reader``; if ``save``, write its file first."""
        num_turns = session.info.num_turns + num_new_turns
        info = replace(session.info, totals=reader.totals, is_saved=save, num_turns=num_turns)
        if save:
            self.store.save(info.session_id, reader, {"created": info.created, "turns": info.num_turns})
        session.reader, session.info = reader, info

    def delete(self, session_id: str, deadline: float | None = None) -> None:
        """Remove a session and its file, even if damaged; otherwise raises like :meth:`acquire`."""
        session = self.get(session_id)
        with _locked(session, deadline):
            if self._store is not None:
                self._store.delete(session_id)
            session.is_deleted, session.reader = True, None
            with self._lock:
                self._sessions.pop(session_id, None)

    def close(self) -> None:
        """Save every changed session, if there is a store."""
        if self._store is None:
            return
        for session in self.list_sessions():
            with session.lock:
                self._save_changes(session)
        self._store.close()

    def _evict_idle(self) -> None:
        """Evict idle sessions to disk until at most ``max_in_memory`` remain."""
        if self._store is None:
            return
        in_memory = [session for session in self.list_sessions() if session.reader is not None]
        for session in in_memory[: max(len(in_memory) - self.max_in_memory, 0)]:
            if not session.lock.acquire(blocking=False):
                continue
            try:
                if session.reader is not None and not session.is_deleted:
                    self._save_changes(session)
                    session.reader, session.info = None, replace(session.info, in_memory=False)
            finally:
                session.lock.release()

    def _save_changes(self, session: Session) -> None:
        if session.reader is not None and not session.info.is_saved:
            self.update(session, session.reader, save=True)


@contextlib.contextmanager
def _locked(session: Session, deadline: float | None) -> Iterator[None]:
    with acquire_before(deadline, session.lock, "The session was busy until the request timed out."):
        if session.is_deleted:
            raise SessionNotFoundError(session.info.session_id)
        yield
