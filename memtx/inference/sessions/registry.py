"""Which sessions there are, who holds each of them, and which are in memory: the others wait on disk."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from memtx.errors import MemtxError, check_at_least
from memtx.inference.engine import DeadlineExceededError, remaining_seconds
from memtx.inference.reader import StreamReader, Totals
from memtx.inference.sessions.store import SESSION_ID_PATTERN, SessionStore


class SessionNotFoundError(MemtxError):
    """There is no session of that name."""


class SessionLimitError(MemtxError):
    """There are as many sessions as may be."""


@dataclass(frozen=True)
class SessionInfo:
    """What is known of a session without reading.

    Attributes:
        session_id: 32 hexadecimal digits.
        created: seconds since 1970.
        totals: sums over what was scored and fed.
        in_memory: whether its state is in memory.
        is_saved: whether its file holds just what the session is now.
    """

    session_id: str
    created: float
    totals: Totals
    in_memory: bool
    is_saved: bool


@dataclass
class Session:
    """One session; ``reader`` is None while it waits on disk, and only who holds ``lock`` may touch it."""

    info: SessionInfo
    reader: StreamReader | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_deleted: bool = False


class SessionRegistry:
    """All sessions of a pool, by name.

    Args:
        reader_factory: makes a reader at the beginning of a text.
        store: where sessions are saved; None keeps all in memory.
        max_in_memory: sessions in memory at most, where there is a store.
        max_sessions: sessions at most.
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
        self.max_in_memory = max_in_memory
        self.max_sessions = max_sessions
        self._reader_factory = reader_factory
        self._store = store
        self._lock = threading.Lock()
        # The one unused for longest first.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        for name, totals, facts in store.iter_sessions() if store is not None else ():
            created = facts.get("created")
            info = SessionInfo(name, created if isinstance(created, float) else 0.0, totals, False, True)
            self._sessions[name] = Session(info, None)

    @property
    def store(self) -> SessionStore:
        """Where sessions are saved.

        Raises:
            MemtxError: nowhere.
        """
        if self._store is None:
            raise MemtxError("The pool has no folder to save sessions in.", "Give it one.")
        return self._store

    @property
    def counts(self) -> dict[str, int]:
        """How many sessions are in memory, and how many there are."""
        held = self.list_sessions()
        return {"in_memory": sum(one.reader is not None for one in held), "total": len(held)}

    def list_sessions(self) -> list[Session]:
        """Return all sessions, the one unused for longest first."""
        with self._lock:
            return list(self._sessions.values())

    def get(self, session_id: str) -> Session:
        """Return a session.

        Raises:
            SessionNotFoundError: there is none.
        """
        with self._lock:
            session = self._sessions.get(session_id)
        if session is None:
            raise _not_found(session_id)
        return session

    def check_limit(self) -> None:
        """Raise SessionLimitError where there are as many sessions as may be."""
        if len(self._sessions) >= self.max_sessions:
            raise SessionLimitError(
                f"There are {self.max_sessions} sessions, as many as may be.", "Delete one, or come back later."
            )

    def add(self, reader: StreamReader) -> str:
        """Begin a session that stands where a reader does, and return its name.

        Raises:
            SessionLimitError: there are as many as may be.
        """
        name = secrets.token_hex(16)
        with self._lock:
            self.check_limit()
            self._sessions[name] = Session(SessionInfo(name, time.time(), reader.totals, True, False), reader)
        self._evict_idle()
        return name

    @contextlib.contextmanager
    def acquire(self, session_id: str, deadline: float | None = None) -> Iterator[tuple[Session, StreamReader]]:
        """Hold a session alone, its state in memory.

        Raises:
            SessionNotFoundError: there is none.
            DeadlineExceededError: others held it up to the deadline.
            CheckpointError: its file is damaged.
        """
        session = self.get(session_id)
        with _locked(session, deadline):
            if session.reader is None:
                reader = self._reader_factory()
                self.store.load(session_id, reader)
                session.reader = reader
                session.info = replace(session.info, in_memory=True)
            with self._lock:
                self._sessions.move_to_end(session_id)
            yield session, session.reader
        self._evict_idle()

    def update(self, session: Session, *, save: bool) -> None:
        """Take down where a session stands now, and write it if asked; whoever calls holds it."""
        assert session.reader is not None
        if save:
            self.store.save(session.info.session_id, session.reader, {"created": session.info.created})
        session.info = replace(session.info, totals=session.reader.totals, is_saved=save)

    def delete(self, session_id: str, deadline: float | None = None) -> None:
        """Remove a session and its file; raises what :meth:`acquire` raises, but damage is no hindrance."""
        session = self.get(session_id)
        with _locked(session, deadline):
            if self._store is not None:
                self._store.delete(session_id)
            session.is_deleted, session.reader = True, None
            with self._lock:
                self._sessions.pop(session_id, None)

    def close(self) -> None:
        """Save every session that changed, where there is a store."""
        if self._store is None:
            return
        for session in self.list_sessions():
            with session.lock:
                if session.reader is not None and not session.info.is_saved:
                    self.update(session, save=True)
        self._store.close()

    def _evict_idle(self) -> None:
        """Send sessions that nobody holds to disk until as few are in memory as may be."""
        if self._store is None:
            return
        held = [one for one in self.list_sessions() if one.reader is not None]
        for session in held[: max(len(held) - self.max_in_memory, 0)]:
            if session.lock.acquire(blocking=False):
                try:
                    if session.reader is not None and not session.is_deleted:
                        if not session.info.is_saved:
                            self.update(session, save=True)
                        session.reader = None
                        session.info = replace(session.info, in_memory=False)
                finally:
                    session.lock.release()


def _not_found(session_id: str) -> SessionNotFoundError:
    shown = f"'{session_id}'" if SESSION_ID_PATTERN.fullmatch(session_id) else "of that name"
    return SessionNotFoundError(f"There is no session {shown}.", "Create one; a deleted one is gone.")


@contextlib.contextmanager
def _locked(session: Session, deadline: float | None) -> Iterator[None]:
    left = remaining_seconds(deadline)
    if not session.lock.acquire(timeout=-1 if left is None else left):
        raise DeadlineExceededError("The session was busy for longer than a request may take.", "Ask it less at once.")
    try:
        if session.is_deleted:
            raise _not_found(session.info.session_id)
        yield
    finally:
        session.lock.release()
