"""Many sessions of one model: read and gone on with in shared calls, kept in memory or on disk.

Every session has the same fixed state, so a batch is rows joined and taken apart again, and what a session costs is
known. A session gives what it gives alone, up to rounding: in float32 a draw may fall the other way where two
probabilities meet within rounding, so equal seeds give equal texts but for such a draw.

Methods may be called from any thread and block; what one session is asked is done one after the other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from memtx.data.tokenizers import Tokenizer
from memtx.inference.continuation import Continuation, Piece, Request
from memtx.inference.engine import Arrivals, Engine, Generation
from memtx.inference.generate import newest_tokens
from memtx.inference.reader import SegmentResult, StreamReader, Totals
from memtx.inference.session import Identity
from memtx.inference.shelf import Shelf
from memtx.inference.table import SessionInfo, SessionTable
from memtx.models.memory_transformer import MemoryTransformer

GB = 10**9


class SessionPool:
    """Sessions of one model.

    A ``deadline`` is a time of ``time.monotonic``: what is not done by then raises OutOfTimeError. A name that is no
    session's raises NoSuchSessionError.

    Args:
        model: put into eval mode; it belongs to the pool's own thread from here on.
        tokenizer: the one it was trained with.
        folder: where sessions go when they are saved or idle; those that are there come back. None keeps all in memory.
        segment: tokens a segment.
        resident: sessions in memory at most; those unused for longest go to disk.
        limit: sessions at most, on disk included.
        rows: texts made at once; more wait.
        batch_tokens: tokens read in one call at most, where that is more than one segment; by default what suits the
            model's device.

    Raises:
        MemtxError: a number out of its range, or a folder that cannot be used.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str] | None = None,
        *,
        segment: int = 512,
        resident: int = 256,
        limit: int = 4096,
        rows: int = 64,
        batch_tokens: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.segment = segment
        # Every reader begins as its fork: the state of fresh streams is made once.
        self._fresh = StreamReader(model, tokenizer, segment)
        self.session_bytes = self._fresh.state.nbytes
        shelf = Shelf(folder, Identity.of(model, tokenizer)) if folder is not None else None
        self.table = SessionTable(self.reader, shelf, resident=resident, limit=limit)
        self.engine = Engine(model, rows=rows, batch_tokens=batch_tokens)

    @property
    def sessions_per_gb(self) -> int:
        """How many sessions' states 10^9 bytes hold, in memory as on disk; the text that waits comes on top."""
        return GB // max(self.session_bytes, 1)

    def reader(self, *, top: int = 0, deadline: float | None = None) -> StreamReader:
        """Return a reader at the beginning of a text whose segments are read in the pool's calls; it is no session."""
        made = self._fresh.fork()
        made.top, made.scorer = top, self.engine.scorer(deadline)
        return made

    def create(self) -> str:
        """Begin a session and return its name.

        Raises:
            FullError: there are as many as may be.
        """
        return self.table.add(self.reader())

    def names(self) -> list[str]:
        """Return the names of all sessions, the one unused for longest first."""
        return [session.info.name for session in self.table.all()]

    def info(self, name: str) -> SessionInfo:
        """Say where a session stands, as of the last thing that was done."""
        return self.table.find(name).info

    def feed(
        self, name: str, text: str | bytes, *, end: bool = False, save: bool = False, deadline: float | None = None
    ) -> list[SegmentResult]:
        """Let a session read more of its text; on an error it stays where it was.

        Args:
            name: the session's.
            text: any amount, cut anywhere.
            end: whether the text ends here, so that what waits is read too.
            save: whether to write the session before returning.
            deadline: by when it must be read.

        Raises:
            DataError: the text is not UTF-8.
        """
        with self.table.use(name, deadline) as (session, reader), _all_or_nothing(reader):
            with self._timed(reader, deadline):
                results = list(chain(reader.feed(text), reader.finish() if end else ()))
            self.table.note(session, save=save)
        return results

    def score(
        self, name: str, text: str, *, top: int = 0, embeddings: bool = False, deadline: float | None = None
    ) -> tuple[Totals, list[SegmentResult]]:
        """Score a text that would go on a session, which stays as it is.

        Returns:
            where the session stands, and results of all that it had not read yet: what waited in it, then the text.
        """
        fork = self.branch(name, deadline=deadline)
        fork.top, fork.embeddings = top, embeddings
        return fork.totals, list(chain(fork.feed(text), fork.finish(last=True)))

    def generate(
        self, name: str, prompt: str, requests: Iterable[Request], *, deadline: float | None = None
    ) -> list[Generation]:
        """Go on with a session, which stays as it is; one text a request."""
        fork = self.branch(name, deadline=deadline)
        return self._prompted(fork, prompt, requests, deadline)

    def branch(self, name: str, *, deadline: float | None = None) -> StreamReader:
        """Return a reader that goes on where a session stands; it is no session."""
        with self.table.use(name, deadline) as (_, reader):
            fork = reader.fork()
        fork.scorer = self.engine.scorer(deadline)
        return fork

    def write(
        self,
        name: str,
        prompt: str,
        request: Request,
        *,
        save: bool = False,
        deadline: float | None = None,
        listen: Callable[[Generation], object] | None = None,
    ) -> Iterator[Piece]:
        """Go on with a session and let it read the prompt and what was made.

        The session is held until the iterator ends; whoever stops listening leaves it as it was.

        Args:
            name: the session's.
            prompt: read before.
            request: how to go on.
            save: whether to write the session at the end.
            deadline: by when it must be made.
            listen: is told of the generation before the first piece.
        """
        with self.table.use(name, deadline) as (session, reader):
            (generation,) = self._prompted(reader.fork(), prompt, [request], deadline)
            if listen is not None:
                listen(generation)
            made = []
            for piece in generation:
                made.append(piece.text)
                yield piece
            with _all_or_nothing(reader):
                with self._timed(reader, deadline):
                    for _ in reader.feed(prompt + "".join(made)):
                        pass
                self.table.note(session, save=save)

    def go_on(
        self,
        reader: StreamReader,
        recent: list[int],
        requests: Iterable[Request],
        *,
        deadline: float | None = None,
        arrivals: Iterable[Arrivals | None] | None = None,
    ) -> list[Generation]:
        """Begin to make texts that go on where a reader stands; returns at once.

        Args:
            reader: at the end of its text; stays as it is.
            recent: the newest tokens of the text, for the repetition penalty.
            requests: one text each.
            deadline: by when they must be made.
            arrivals: where the pieces of each go, instead of its own iterator.
        """
        texts = [Continuation(self.tokenizer, reader.last, recent, one) for one in requests]
        places = list(arrivals) if arrivals is not None else [None] * len(texts)
        return [
            self.engine.generate(reader.state, text, deadline, place) for text, place in zip(texts, places, strict=True)
        ]

    def fork(self, name: str, *, deadline: float | None = None) -> str:
        """Begin a session that goes on where another stands, and return its name; raises what :meth:`create` does."""
        with self.table.use(name, deadline) as (_, reader):
            other = reader.fork()
        return self.table.add(other)

    def save(self, name: str, *, deadline: float | None = None) -> None:
        """Write a session; when this returns it survives the end of the process.

        Raises:
            MemtxError: the pool has no folder, or the file cannot be written.
        """
        with self.table.use(name, deadline) as (session, _):
            self.table.note(session, save=True)

    def export(self, name: str, *, deadline: float | None = None) -> bytes:
        """Return a session as the content of its file, which is written for it."""
        with self.table.use(name, deadline) as (session, _):
            self.table.note(session, save=True)
            return self.table.shelf.path(name).read_bytes()

    def take_in(self, content: bytes) -> str:
        """Begin a session from what :meth:`export` returned, and return its name.

        Raises:
            CheckpointError: the content is damaged, or of another model or tokenizer.
            FullError: there are as many sessions as may be.
        """
        self.table.check_room()
        reader = self.reader()
        self.table.shelf.take_in(content, reader)
        return self.table.add(reader)

    def delete(self, name: str, *, deadline: float | None = None) -> None:
        """Remove a session and its file."""
        self.table.delete(name, deadline)

    def close(self) -> None:
        """Stop the pool's thread and save every session, where there is a folder."""
        self.engine.close()
        self.table.close()

    def _prompted(
        self, reader: StreamReader, prompt: str, requests: Iterable[Request], deadline: float | None
    ) -> list[Generation]:
        with self._timed(reader, deadline):
            recent = newest_tokens(chain(reader.feed(prompt), reader.finish()))
        return self.go_on(reader, recent, requests, deadline=deadline)

    @contextlib.contextmanager
    def _timed(self, reader: StreamReader, deadline: float | None) -> Iterator[None]:
        """Give a reader's segments a deadline for once."""
        usual = reader.scorer
        reader.scorer = self.engine.scorer(deadline)
        try:
            yield
        finally:
            reader.scorer = usual


@contextlib.contextmanager
def _all_or_nothing(reader: StreamReader) -> Iterator[None]:
    before = reader.snapshot()
    try:
        yield
    except BaseException:
        reader.restore(before)
        raise
