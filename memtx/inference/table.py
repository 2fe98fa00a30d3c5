"""Which sessions there are, who holds each of them, and which are in memory: the others wait on disk."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from memtx.errors import MemtxError
from memtx.inference.engine import OutOfTimeError, seconds_left
from memtx.inference.reader import StreamReader, Totals
from memtx.inference.shelf import NAME, Shelf


class NoSuchSessionError(MemtxError):
    """There is no session of that name."""


class FullError(MemtxError):
    """There are as many sessions as may be."""


@dataclass(frozen=True)
class SessionInfo:
    """What is known of a session without reading.

    Attributes:
        name: 32 hexadecimal digits.
        created: seconds since 1970.
        totals: sums over what was scored and fed.
        resident: whether its state is in memory.
        saved: whether its file holds just what the session is now.
    """

    name: str
    created: float
    totals: Totals
    resident: bool
    saved: bool


@dataclass
class Session:
    """One session; ``reader`` is None while it waits on disk, and only who holds ``lock`` may touch it."""

    info: SessionInfo
    reader: StreamReader | None
    lock: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False


class SessionTable:
    """All sessions of a pool, by name.

    Args:
        new_reader: makes a reader at the beginning of a text.
        shelf: where sessions are saved; None keeps all in memory.
        resident: sessions in memory at most, where there is a shelf.
        limit: sessions at most.
    """

    def __init__(
        self, new_reader: Callable[[], StreamReader], shelf: Shelf | None, *, resident: int, limit: int
    ) -> None:
        for name, number in (("resident", resident), ("limit", limit)):
            if number < 1:
                raise MemtxError(f"{name} is {number}, expected at least 1.")
        self.resident = resident
        self.limit = limit
        self._new_reader = new_reader
        self._shelf = shelf
        self._lock = threading.Lock()
        # The one unused for longest first.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        for name, totals, facts in shelf.sessions() if shelf is not None else ():
            created = facts.get("created")
            info = SessionInfo(name, created if isinstance(created, float) else 0.0, totals, False, True)
            self._sessions[name] = Session(info, None)

    @property
    def shelf(self) -> Shelf:
        """Where sessions are saved.

        Raises:
            MemtxError: nowhere.
        """
        if self._shelf is None:
            raise MemtxError("The pool has no folder to save sessions in.", "Give it one.")
        return self._shelf

    @property
    def counts(self) -> dict[str, int]:
        """How many sessions are in memory, and how many there are."""
        held = self.all()
        return {"resident": sum(one.reader is not None for one in held), "all": len(held)}

    def all(self) -> list[Session]:
        """Return all sessions, the one unused for longest first."""
        with self._lock:
            return list(self._sessions.values())

    def find(self, name: str) -> Session:
        """Return a session.

        Raises:
            NoSuchSessionError: there is none.
        """
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            raise _missing(name)
        return session

    def check_room(self) -> None:
        """Raise FullError where there are as many sessions as may be."""
        if len(self._sessions) >= self.limit:
            raise FullError(f"There are {self.limit} sessions, as many as may be.", "Delete one, or come back later.")

    def add(self, reader: StreamReader) -> str:
        """Begin a session that stands where a reader does, and return its name.

        Raises:
            FullError: there are as many as may be.
        """
        name = secrets.token_hex(16)
        with self._lock:
            self.check_room()
            self._sessions[name] = Session(SessionInfo(name, time.time(), reader.totals, True, False), reader)
        self._make_room()
        return name

    @contextlib.contextmanager
    def use(self, name: str, deadline: float | None = None) -> Iterator[tuple[Session, StreamReader]]:
        """Hold a session alone, its state in memory.

        Raises:
            NoSuchSessionError: there is none.
            OutOfTimeError: others held it up to the deadline.
            CheckpointError: its file is damaged.
        """
        session = self.find(name)
        with _held(session, deadline):
            if session.reader is None:
                reader = self._new_reader()
                self.shelf.load(name, reader)
                session.reader = reader
                session.info = replace(session.info, resident=True)
            with self._lock:
                self._sessions.move_to_end(name)
            yield session, session.reader
        self._make_room()

    def note(self, session: Session, *, save: bool) -> None:
        """Take down where a session stands now, and write it if asked; whoever calls holds it."""
        assert session.reader is not None
        if save:
            self.shelf.save(session.info.name, session.reader, {"created": session.info.created})
        session.info = replace(session.info, totals=session.reader.totals, saved=save)

    def delete(self, name: str, deadline: float | None = None) -> None:
        """Remove a session and its file; raises what :meth:`use` raises, but damage is no hindrance."""
        session = self.find(name)
        with _held(session, deadline):
            if self._shelf is not None:
                self._shelf.delete(name)
            session.gone, session.reader = True, None
            with self._lock:
                self._sessions.pop(name, None)

    def close(self) -> None:
        """Save every session that changed, where there is a shelf."""
        if self._shelf is None:
            return
        for session in self.all():
            with session.lock:
                if session.reader is not None and not session.info.saved:
                    self.note(session, save=True)
        self._shelf.close()

    def _make_room(self) -> None:
        """Send sessions that nobody holds to disk until as few are in memory as may be."""
        if self._shelf is None:
            return
        held = [one for one in self.all() if one.reader is not None]
        for session in held[: max(len(held) - self.resident, 0)]:
            if session.lock.acquire(blocking=False):
                try:
                    if session.reader is not None and not session.gone:
                        if not session.info.saved:
                            self.note(session, save=True)
                        session.reader = None
                        session.info = replace(session.info, resident=False)
                finally:
                    session.lock.release()


def _missing(name: str) -> NoSuchSessionError:
    shown = f"'{name}'" if NAME.fullmatch(name) else "of that name"
    return NoSuchSessionError(f"There is no session {shown}.", "Create one; a deleted one is gone.")


@contextlib.contextmanager
def _held(session: Session, deadline: float | None) -> Iterator[None]:
    left = seconds_left(deadline)
    if not session.lock.acquire(timeout=-1 if left is None else left):
        raise OutOfTimeError("The session was busy for longer than a request may take.", "Ask it less at once.")
    try:
        if session.gone:
            raise _missing(session.info.name)
        yield
    finally:
        session.lock.release()
