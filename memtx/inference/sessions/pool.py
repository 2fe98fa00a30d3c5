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
from memtx.inference.engine import Engine, Generation, OutputQueue
from memtx.inference.generate import collect_recent_tokens
from memtx.inference.reader import SegmentResult, StreamReader, Totals
from memtx.inference.sessions.file import Fingerprints
from memtx.inference.sessions.registry import SessionInfo, SessionRegistry
from memtx.inference.sessions.store import SessionStore
from memtx.inference.token_generator import GenerationConfig, TextDelta, TokenGenerator
from memtx.models.memory_transformer import MemoryTransformer

GB = 10**9


class SessionPool:
    """Sessions of one model.

    A ``deadline`` is a time of ``time.monotonic``: what is not done by then raises DeadlineExceededError. An id that is
    no session's raises SessionNotFoundError.

    Args:
        model: put into eval mode; it belongs to the pool's own thread from here on.
        tokenizer: the one it was trained with.
        folder: where sessions go when they are saved or idle; those that are there come back. None keeps all in memory.
        segment_length: tokens a segment.
        max_in_memory: sessions in memory at most; those unused for longest go to disk.
        max_sessions: sessions at most, on disk included.
        max_batch_size: texts made at once; more wait.
        max_batch_tokens: tokens read in one call at most, where that is more than one segment; by default what suits
            the model's device.

    Raises:
        MemtxError: a number out of its range, or a folder that cannot be used.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str] | None = None,
        *,
        segment_length: int = 512,
        max_in_memory: int = 256,
        max_sessions: int = 4096,
        max_batch_size: int = 64,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.segment_length = segment_length
        # Every reader begins as its fork: the state of fresh streams is made once.
        self._template_reader = StreamReader(model, tokenizer, segment_length)
        self.session_bytes = self._template_reader.state.nbytes
        shelf = SessionStore(folder, Fingerprints.from_model(model, tokenizer)) if folder is not None else None
        self.registry = SessionRegistry(self.new_reader, shelf, max_in_memory=max_in_memory, max_sessions=max_sessions)
        self.engine = Engine(model, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)

    @property
    def sessions_per_gb(self) -> int:
        """How many sessions' states 10^9 bytes hold, in memory as on disk; the text that waits comes on top."""
        return GB // max(self.session_bytes, 1)

    def new_reader(self, *, num_logprobs: int = 0, deadline: float | None = None) -> StreamReader:
        """Return a reader at the beginning of a text whose segments are read in the pool's calls; it is no session."""
        made = self._template_reader.fork()
        made.num_logprobs, made.score_fn = num_logprobs, self.engine.make_score_fn(deadline)
        return made

    def create(self) -> str:
        """Begin a session and return its name.

        Raises:
            SessionLimitError: there are as many as may be.
        """
        return self.registry.add(self.new_reader())

    def session_ids(self) -> list[str]:
        """Return the names of all sessions, the one unused for longest first."""
        return [session.info.session_id for session in self.registry.list_sessions()]

    def info(self, session_id: str) -> SessionInfo:
        """Say where a session stands, as of the last thing that was done."""
        return self.registry.get(session_id).info

    def feed(
        self,
        session_id: str,
        text: str | bytes,
        *,
        end_of_text: bool = False,
        save: bool = False,
        deadline: float | None = None,
    ) -> list[SegmentResult]:
        """Let a session read more of its text; on an error it stays where it was.

        Args:
            session_id: the session's.
            text: any amount, cut anywhere.
            end_of_text: whether the text ends here, so that what waits is read too.
            save: whether to write the session before returning.
            deadline: by when it must be read.

        Raises:
            DataError: the text is not UTF-8.
        """
        with self.registry.acquire(session_id, deadline) as (session, reader), _rollback_on_error(reader):
            with self._with_deadline(reader, deadline):
                results = list(chain(reader.feed(text), reader.finish() if end_of_text else ()))
            self.registry.update(session, save=save)
        return results

    def score(
        self,
        session_id: str,
        text: str,
        *,
        num_logprobs: int = 0,
        return_hidden_states: bool = False,
        deadline: float | None = None,
    ) -> tuple[Totals, list[SegmentResult]]:
        """Score a text that would go on a session, which stays as it is.

        Returns:
            where the session stands, and results of all that it had not read yet: what waited in it, then the text.
        """
        fork = self.fork_reader(session_id, deadline=deadline)
        fork.num_logprobs, fork.return_hidden_states = num_logprobs, return_hidden_states
        return fork.totals, list(chain(fork.feed(text), fork.finish(discard_state=True)))

    def generate(
        self, session_id: str, prompt: str, configs: Iterable[GenerationConfig], *, deadline: float | None = None
    ) -> list[Generation]:
        """Go on with a session, which stays as it is; one text a request."""
        fork = self.fork_reader(session_id, deadline=deadline)
        return self._generate_from_prompt(fork, prompt, configs, deadline)

    def fork_reader(self, session_id: str, *, deadline: float | None = None) -> StreamReader:
        """Return a reader that goes on where a session stands; it is no session."""
        with self.registry.acquire(session_id, deadline) as (_, reader):
            fork = reader.fork()
        fork.score_fn = self.engine.make_score_fn(deadline)
        return fork

    def generate_and_append(
        self,
        session_id: str,
        prompt: str,
        config: GenerationConfig,
        *,
        save: bool = False,
        deadline: float | None = None,
        on_start: Callable[[Generation], object] | None = None,
    ) -> Iterator[TextDelta]:
        """Go on with a session and let it read the prompt and what was made.

        The session is held until the iterator ends; whoever stops listening leaves it as it was.

        Args:
            session_id: the session's.
            prompt: read before.
            config: how to go on.
            save: whether to write the session at the end.
            deadline: by when it must be made.
            on_start: is told of the generation before the first piece.
        """
        with self.registry.acquire(session_id, deadline) as (session, reader):
            (generation,) = self._generate_from_prompt(reader.fork(), prompt, [config], deadline)
            if on_start is not None:
                on_start(generation)
            made = []
            for piece in generation:
                made.append(piece.text)
                yield piece
            with _rollback_on_error(reader):
                with self._with_deadline(reader, deadline):
                    for _ in reader.feed(prompt + "".join(made)):
                        pass
                self.registry.update(session, save=save)

    def start_generation(
        self,
        reader: StreamReader,
        recent_tokens: list[int],
        configs: Iterable[GenerationConfig],
        *,
        deadline: float | None = None,
        output_queues: Iterable[OutputQueue | None] | None = None,
    ) -> list[Generation]:
        """Begin to make texts that go on where a reader stands; returns at once.

        Args:
            reader: at the end of its text; stays as it is.
            recent_tokens: the newest tokens of the text, for the repetition penalty.
            configs: one text each.
            deadline: by when they must be made.
            output_queues: where the pieces of each go, instead of its own iterator.
        """
        texts = [TokenGenerator(self.tokenizer, reader.last_token, recent_tokens, one) for one in configs]
        places = list(output_queues) if output_queues is not None else [None] * len(texts)
        return [
            self.engine.generate(reader.state, text, deadline, place) for text, place in zip(texts, places, strict=True)
        ]

    def fork(self, session_id: str, *, deadline: float | None = None) -> str:
        """Begin a session that goes on where another stands, and return its name; raises what :meth:`create` does."""
        with self.registry.acquire(session_id, deadline) as (_, reader):
            other = reader.fork()
        return self.registry.add(other)

    def save(self, session_id: str, *, deadline: float | None = None) -> None:
        """Write a session; when this returns it survives the end of the process.

        Raises:
            MemtxError: the pool has no folder, or the file cannot be written.
        """
        with self.registry.acquire(session_id, deadline) as (session, _):
            self.registry.update(session, save=True)

    def export_session(self, session_id: str, *, deadline: float | None = None) -> bytes:
        """Return a session as the content of its file, which is written for it."""
        with self.registry.acquire(session_id, deadline) as (session, _):
            self.registry.update(session, save=True)
            return self.registry.store.path(session_id).read_bytes()

    def import_session(self, data: bytes) -> str:
        """Begin a session from what :meth:`export_session` returned, and return its name.

        Raises:
            CheckpointError: the content is damaged, or of another model or tokenizer.
            SessionLimitError: there are as many sessions as may be.
        """
        self.registry.check_limit()
        reader = self.new_reader()
        self.registry.store.import_session(data, reader)
        return self.registry.add(reader)

    def delete(self, session_id: str, *, deadline: float | None = None) -> None:
        """Remove a session and its file."""
        self.registry.delete(session_id, deadline)

    def close(self) -> None:
        """Stop the pool's thread and save every session, where there is a folder."""
        self.engine.close()
        self.registry.close()

    def _generate_from_prompt(
        self, reader: StreamReader, prompt: str, configs: Iterable[GenerationConfig], deadline: float | None
    ) -> list[Generation]:
        with self._with_deadline(reader, deadline):
            recent = collect_recent_tokens(chain(reader.feed(prompt), reader.finish()))
        return self.start_generation(reader, recent, configs, deadline=deadline)

    @contextlib.contextmanager
    def _with_deadline(self, reader: StreamReader, deadline: float | None) -> Iterator[None]:
        """Give a reader's segments a deadline for once."""
        usual = reader.score_fn
        reader.score_fn = self.engine.make_score_fn(deadline)
        try:
            yield
        finally:
            reader.score_fn = usual


@contextlib.contextmanager
def _rollback_on_error(reader: StreamReader) -> Iterator[None]:
    before = reader.snapshot()
    try:
        yield
    except BaseException:
        reader.restore(before)
        raise
