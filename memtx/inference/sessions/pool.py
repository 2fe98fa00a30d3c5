"""Session pool: many sessions of one model, read and continued in shared calls, in memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from memtx.data.tokenizers import Tokenizer
from memtx.errors import check_at_least
from memtx.inference.engine import Engine, Generation, OutputFn
from memtx.inference.generate import GenerationConfig, TextDelta, TokenGenerator
from memtx.inference.reader import SegmentResult, StreamReader, Totals
from memtx.inference.sessions.file import Fingerprints
from memtx.inference.sessions.prefix_cache import PrefixCache, ReadPrompt, read_prompt
from memtx.inference.sessions.prefix_folder import PrefixFolder
from memtx.inference.sessions.registry import SessionInfo, SessionRegistry
from memtx.inference.sessions.store import SessionStore
from memtx.models.recurrent_lm import RecurrentLanguageModel


class SessionPool:
    """Sessions of one model; every session has a state of the same fixed size.

    Results equal those of a single reader, up to rounding; so equal seeds give equal texts, unless a draw falls within
    float32 rounding of the border between two tokens.

    Methods can be called from any thread, and block; requests to one session run one after the other. An unknown
    ``session_id`` raises SessionNotFoundError. DeadlineExceededError is raised after ``deadline``
    (``time.monotonic``). With ``save``, a session is written to disk before the method returns. With ``parse_special``,
    a text that spells a special token becomes that token; it is otherwise plain, whatever was read before.

    Args:
        model: Language model; a module is put into eval mode. Only the pool's thread may use it.
        tokenizer: Tokenizer of the model.
        folder: Folder of saved and idle sessions, which are restored. None keeps all sessions in memory.
        segment_length: Tokens per segment.
        max_in_memory: Maximum number of sessions in memory; the least recently used are evicted to disk.
        max_sessions: Maximum number of sessions, including those on disk.
        max_batch_size, max_batch_tokens: As in :class:`~memtx.inference.engine.Engine`.
        prefix_cache_bytes: Maximum bytes of cached prefixes in memory. Defaults to 0, no cache.
        prefix_cache_disk_bytes: Maximum bytes of cached prefixes on disk, in ``folder``. Defaults to 0.

    Raises:
        MemtxError: An argument is out of range, or the folder cannot be used.
    """

    def __init__(
        self,
        model: RecurrentLanguageModel,
        tokenizer: Tokenizer,
        folder: str | os.PathLike[str] | None = None,
        *,
        segment_length: int = 512,
        max_in_memory: int = 256,
        max_sessions: int = 4096,
        max_batch_size: int = 64,
        max_batch_tokens: int | None = None,
        prefix_cache_bytes: int = 0,
        prefix_cache_disk_bytes: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.segment_length = model, tokenizer, segment_length
        # New readers are forked from it, so that the initial state is created once.
        self._template_reader = StreamReader(model, tokenizer, segment_length)
        self.session_bytes = self._template_reader.state.nbytes
        check_at_least(0, prefix_cache_bytes=prefix_cache_bytes, prefix_cache_disk_bytes=prefix_cache_disk_bytes)
        fingerprints = Fingerprints.from_model(model, tokenizer) if folder is not None or prefix_cache_bytes else None
        store = SessionStore(folder, fingerprints) if folder is not None and fingerprints else None
        self.prefix_cache: PrefixCache | None = None
        if prefix_cache_bytes and fingerprints:
            prefix_folder = None
            if store is not None and prefix_cache_disk_bytes:
                path = store.folder / "prefix-cache"
                prefix_folder = PrefixFolder(path, prefix_cache_disk_bytes, self._template_reader, fingerprints)
            self.prefix_cache = PrefixCache(fingerprints.model, prefix_cache_bytes, prefix_folder)
        self.registry = SessionRegistry(self.new_reader, store, max_in_memory=max_in_memory, max_sessions=max_sessions)
        self.engine = Engine(model, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)

    @property
    def sessions_per_gb(self) -> int:
        """Number of session states per 10^9 bytes, in memory or on disk, without pending text."""
        return 10**9 // max(self.session_bytes, 1)

    def new_reader(self, *, num_logprobs: int = 0, deadline: float | None = None) -> StreamReader:
        """Return a reader of a new text that uses the pool's engine but is not a session."""
        reader = self._template_reader.fork()
        reader.num_logprobs, reader.score_fn = num_logprobs, self.engine.make_score_fn(deadline)
        return reader

    def read_prompt(
        self,
        reader: StreamReader,
        prompt: str | Sequence[int],
        *,
        namespace: str = "",
        deadline: float | None = None,
        discard_state: bool = False,
        needs_scores: bool = False,
    ) -> ReadPrompt:
        """Read a prompt with the prefix cache, if the reader is new; arguments as in :func:`read_prompt`."""
        options: dict[str, Any] = {"discard_state": discard_state, "needs_scores": needs_scores}
        return read_prompt(reader, prompt, self.prefix_cache, namespace=namespace, deadline=deadline, **options)

    def create(self) -> str:
        """Create a session and return its id; raises SessionLimitError."""
        return self.registry.add(self.new_reader())

    def session_ids(self) -> list[str]:
        """Return the ids of all sessions, least recently used first."""
        return [session.info.session_id for session in self.registry.list_sessions()]

    def info(self, session_id: str) -> SessionInfo:
        """Return the description of a session as of its last request."""
        return self.registry.get(session_id).info

    def feed(
        self,
        session_id: str,
        text: str | bytes,
        *,
        end_of_text: bool = False,
        parse_special: bool = False,
        save: bool = False,
        deadline: float | None = None,
    ) -> list[SegmentResult]:
        """Feed text, split anywhere (bytes are UTF-8), to a session; on an error the session is left unchanged.

        With ``end_of_text``, the text ends here and pending text is read too. Raises DataError if it is not UTF-8.
        """
        with self.registry.acquire(session_id, deadline) as (session, reader):
            fork = self._fork(reader, deadline, parse_special)
            results = list(chain(fork.feed(text), fork.finish() if end_of_text else ()))
            self.registry.update(session, fork, save=save)
        return results

    def score(
        self,
        session_id: str,
        text: str,
        *,
        num_logprobs: int = 0,
        return_hidden_states: bool = False,
        parse_special: bool = False,
        deadline: float | None = None,
    ) -> tuple[Totals, list[SegmentResult]]:
        """Score a continuation of a session, which is left unchanged.

        Returns the session's totals, and the results for its pending text and ``text``.
        """
        fork = self.fork_reader(session_id, parse_special=parse_special, deadline=deadline)
        fork.num_logprobs, fork.return_hidden_states = num_logprobs, return_hidden_states
        return fork.totals, list(chain(fork.feed(text), fork.finish(discard_state=True)))

    def generate(
        self, session_id: str, prompt: str, configs: Iterable[GenerationConfig], *, deadline: float | None = None
    ) -> list[Generation]:
        """Generate continuations of a session, one per config; the session is left unchanged."""
        reader = self.fork_reader(session_id, parse_special=False, deadline=deadline)
        return self._generate_from_prompt(reader, prompt, configs, deadline)

    def fork_reader(
        self, session_id: str, *, parse_special: bool | None = None, deadline: float | None = None
    ) -> StreamReader:
        """Return a reader at the position of a session, independent of it; ``parse_special`` None leaves that as is."""
        with self.registry.acquire(session_id, deadline) as (_, reader):
            return self._fork(reader, deadline, parse_special)

    def generate_and_append(
        self,
        session_id: str,
        prompt: str | Callable[[int, int], list[int]],
        config: GenerationConfig,
        *,
        parse_special: bool = False,
        save: bool = False,
        deadline: float | None = None,
        on_start: Callable[[Generation], object] | None = None,
    ) -> Iterator[TextDelta]:
        """Generate a continuation of a session and append prompt and continuation to it.

        The session is locked until the iterator ends; if iteration stops early, it is left unchanged. ``on_start`` is
        called with the generation before the first part of the text. In a conversation, ``prompt`` returns the tokens
        to answer, given the numbers of answers and of tokens before them, and ``config`` requests log-probabilities,
        which name the tokens of the answer.
        """
        with self.registry.acquire(session_id, deadline) as (session, reader):
            fork = self._fork(reader, deadline, parse_special)
            content = prompt if isinstance(prompt, str) else list[int]()
            if not isinstance(prompt, str):
                fork.splits_documents = False
                list(fork.finish())
                content = prompt(session.info.num_turns, fork.totals.num_tokens)
                fork.begin_with(content)
                # The session goes on from its text, so its conversation begins no document.
                if fork.totals.num_tokens and content[:1] == [self.tokenizer.bos_token_id]:
                    content = content[1:]
            source = self._fork(fork, deadline)
            (generation,) = self._generate_from_prompt(source, content, [config], deadline)
            if on_start is not None:
                on_start(generation)
            parts, answer = list[str](), list[int]()
            for delta in generation:
                parts.append(delta.text)
                answer += [entry.token for entry in delta.token_logprobs]
                yield delta
            if isinstance(content, str):
                list(fork.feed(content))
                fork.parse_special = False  # what the model wrote is plain
                list(fork.feed("".join(parts)))
            else:
                list(chain(source.feed_tokens(answer), source.finish()))
                fork = source
            fork.splits_documents = True
            self.registry.update(session, fork, save=save, num_new_turns=int(not isinstance(content, str)))

    def start_generation(
        self,
        reader: StreamReader,
        recent_tokens: list[int],
        configs: Iterable[GenerationConfig],
        *,
        deadline: float | None = None,
        on_outputs: Iterable[OutputFn] | None = None,
    ) -> list[Generation]:
        """Start generating a continuation per config from a reader at the end of its text.

        Returns immediately and leaves the reader unchanged. ``recent_tokens`` are subject to the repetition penalty;
        ``on_outputs``, one per config, receive the outputs instead of the returned iterators.
        """
        inputs = (self.tokenizer, reader.last_token, recent_tokens)
        generators = [TokenGenerator(*inputs, config, incomplete_bytes=reader.incomplete_bytes) for config in configs]
        if on_outputs is None:
            return [self.engine.generate(reader.state, generator, deadline) for generator in generators]
        pairs = zip(generators, on_outputs, strict=True)
        return [self.engine.generate(reader.state, generator, deadline, on_output) for generator, on_output in pairs]

    def fork(self, session_id: str, *, deadline: float | None = None) -> str:
        """Create a session at the position of another and return its id; raises SessionLimitError."""
        fork = self.fork_reader(session_id, deadline=deadline)
        return self.registry.add(fork, self.info(session_id).num_turns)

    def save(self, session_id: str, *, deadline: float | None = None) -> None:
        """Write a session to disk; raises MemtxError if the pool has no folder or the file cannot be written."""
        with self.registry.acquire(session_id, deadline) as (session, reader):
            self.registry.update(session, reader, save=True)

    def export_session(self, session_id: str, *, deadline: float | None = None) -> bytes:
        """Save a session and return the content of its file."""
        with self.registry.acquire(session_id, deadline) as (session, reader):
            self.registry.update(session, reader, save=True)
            return self.registry.store.path(session_id).read_bytes()

    def import_session(self, data: bytes) -> str:
        """Create a session from the bytes of :meth:`export_session` and return its id; raises SessionLimitError.

        Raises CheckpointError if the bytes are damaged, or from another model or tokenizer.
        """
        self.registry.check_limit()
        reader = self.new_reader()
        self.registry.store.import_session(data, reader)
        return self.registry.add(reader)

    def delete(self, session_id: str, *, deadline: float | None = None) -> None:
        """Remove a session and its file."""
        self.registry.delete(session_id, deadline)

    def close(self) -> None:
        """Stop the engine and, if the pool has a folder, save every session."""
        self.engine.close()
        if self.prefix_cache is not None:
            self.prefix_cache.close()
        self.registry.close()

    def _generate_from_prompt(
        self, reader: StreamReader, prompt: str | list[int], configs: Iterable[GenerationConfig], deadline: float | None
    ) -> list[Generation]:
        tokens = self.read_prompt(reader, prompt, deadline=deadline).tokens
        return self.start_generation(reader, np.unique(tokens).tolist(), configs, deadline=deadline)

    def _fork(self, reader: StreamReader, deadline: float | None, parse_special: bool | None = None) -> StreamReader:
        fork = reader.fork()
        fork.score_fn = self.engine.make_score_fn(deadline)
        if parse_special is not None:
            fork.parse_special = parse_special
        return fork
