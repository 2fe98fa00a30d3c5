"""One thread that runs the model for many: segments that wait are read in one call, texts that go on in one step.

Whoever asks blocks, and so do its neighbours: while one call runs the next batch gathers by itself. A call's rows are
streams, which come and go between calls (continuous batching, Yu et al. 2022, section 3). No segment is cut for the
sake of a batch, so each stream reads what it would read alone; where rows may end before the call does, those of
other lengths are filled up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch

from memtx.errors import MemtxError, check_at_least
from memtx.inference.batching import default_batch_tokens, padding_limit, select_batch
from memtx.inference.decoder import Decoder
from memtx.inference.scoring import ScoreOutput, ScoreRequest, score_segments
from memtx.inference.token_generator import TextDelta, TokenGenerator
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

FINISH_CANCELLED = "cancelled"

BATCH_WAIT_SECONDS = 0.002
"""Seconds that streams just served have to ask again before a call is made without them: without it, the first to
wake would be read alone and the others after it. Far less than a call of a model of any use takes."""

WAIT_CREDIT = 0.8
"""Of the time that a request has waited for its segment, the share by which its next one goes before those that come
now. At 0 a text of several segments would line up anew with each, and its time would be as uncertain as all its turns
together; at 1 those who come while long texts are read would wait for all of these. So they wait for 1 / (1 - 0.8)
segments of each at most."""


class DeadlineExceededError(MemtxError):
    """A request took longer than it may."""


class ClosedError(MemtxError):
    """The engine was closed while a request was waiting."""


def remaining_seconds(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, a time of ``time.monotonic``; None for no end.

    Raises:
        DeadlineExceededError: it has passed.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError("The request took longer than it may.", "Ask for less at once.")
    return left


QueueItem = TextDelta | BaseException | None
"""A piece; an error, after which nothing comes; or None for the end."""


class OutputQueue(Protocol):
    """Where the engine's thread puts what it made; must not block."""

    def put(self, item: QueueItem) -> None:
        """Take a piece, an error or the end."""
        ...


class Generation:
    """A text that is being made: an iterator over its pieces, for one thread; the engine's thread fills it.

    Attributes:
        token_generator: what decides about tokens; its ``finish_reason`` says why it ended, its ``num_generated`` how
            many tokens there are.
    """

    def __init__(
        self,
        state: MemoryState,
        token_generator: TokenGenerator,
        deadline: float | None,
        output_queue: OutputQueue | None = None,
    ) -> None:
        self.state: MemoryState | None = state
        self.token_generator = token_generator
        self.deadline = deadline
        self.is_cancelled = False
        self._queue: queue.SimpleQueue[QueueItem] = queue.SimpleQueue()
        self.output_queue: OutputQueue = output_queue if output_queue is not None else self._queue

    def cancel(self) -> None:
        """End it before the next token; may be called from any thread, at any time."""
        self.is_cancelled = True

    def __iter__(self) -> Iterator[TextDelta]:
        """Yield the pieces, as they come.

        Raises:
            DeadlineExceededError: its deadline passed; it is cancelled.
            MemtxError: the model's logits were not finite, or the engine was closed.
        """
        try:
            while True:
                try:
                    piece = self._queue.get(timeout=remaining_seconds(self.deadline))
                except queue.Empty:
                    continue  # The next look at the clock raises.
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.cancel()


@dataclass(frozen=True)
class PendingSegment:
    """A segment that waits; the one of the earliest ``arrival_time``, a time of ``time.monotonic``, is read next."""

    request: ScoreRequest
    arrival_time: float
    future: Future[ScoreOutput] = field(default_factory=Future)


class Engine:
    """Runs a model for many streams at once.

    Args:
        model: in eval mode; nothing else may use it while a compiled or captured step runs.
        max_batch_size: texts that go on at once; more wait.
        max_batch_tokens: tokens read in one call at most, where that is more than one segment; by default what suits
            the model's device.

    Attributes:
        counters: how many calls of each kind there were, and how many rows and tokens they had together.
    """

    def __init__(
        self, model: MemoryTransformer, *, max_batch_size: int = 64, max_batch_tokens: int | None = None
    ) -> None:
        self._is_cpu = model.embedding.weight.device.type == "cpu"
        max_batch_tokens = default_batch_tokens(self._is_cpu) if max_batch_tokens is None else max_batch_tokens
        check_at_least(1, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.counters = {
            "score_calls": 0,
            "score_segments": 0,
            "score_tokens": 0,
            "decode_calls": 0,
            "decode_tokens": 0,
        }
        self._condition = threading.Condition()
        self._pending_segments: list[PendingSegment] = []
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._decoder: Decoder | None = None
        self._last_batch_size = 1
        # Seconds that those who are read have had beyond their share.
        self._scoring_excess_seconds = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memtx-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Segments and texts that wait for a call."""
        return len(self._pending_segments) + len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts that go on now."""
        return len(self._running)

    def make_score_fn(self, deadline: float | None = None) -> Callable[[ScoreRequest], ScoreOutput]:
        """Return what reads one request's segments, one after the other; raises what :meth:`score` does."""
        turn: float | None = None

        def score_next(reading: ScoreRequest) -> ScoreOutput:
            nonlocal turn
            now = time.monotonic()
            turn = now if turn is None else now - WAIT_CREDIT * (now - turn)
            return self.score(reading, deadline, turn)

        return score_next

    def score(
        self, request: ScoreRequest, deadline: float | None = None, arrival_time: float | None = None
    ) -> ScoreOutput:
        """Read one segment, together with those that others wait for.

        Args:
            request: the segment.
            deadline: a time of ``time.monotonic``.
            arrival_time: likewise, as of when it waits; by default from now on.

        Raises:
            DeadlineExceededError: the deadline passed first; the segment is not read.
            ClosedError: the engine was closed.
        """
        waiting = PendingSegment(request, time.monotonic() if arrival_time is None else arrival_time)
        left = remaining_seconds(deadline)
        with self._condition:
            self._check_open()
            self._pending_segments.append(waiting)
            self._condition.notify()
        try:
            return waiting.future.result(timeout=left)
        except TimeoutError:
            waiting.future.cancel()
            raise DeadlineExceededError("The request took longer than it may.", "Ask for less at once.") from None

    def generate(
        self,
        state: MemoryState,
        token_generator: TokenGenerator,
        deadline: float | None = None,
        output_queue: OutputQueue | None = None,
    ) -> Generation:
        """Begin to make a text; returns at once.

        Args:
            state: where the stream stands, one row; ``token_generator.next_token`` is read next.
            token_generator: what decides about tokens.
            deadline: a time of ``time.monotonic`` at which it is cancelled.
            output_queue: where pieces go instead of the generation's own iterator, which then has none.
        """
        generation = Generation(state, token_generator, deadline, output_queue)
        with self._condition:
            self._check_open()
            if token_generator.finish_reason is None:
                self._waiting.append(generation)
                self._condition.notify()
            else:
                generation.output_queue.put(None)
        return generation

    def close(self) -> None:
        """Stop after the call that runs now; what waits fails."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The engine is closed.", "Make a new one.")

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._closed or self._pending_segments or self._waiting or self._running
                )
                if len(self._pending_segments) < self._last_batch_size and not self._running:
                    self._condition.wait_for(
                        lambda: self._closed or len(self._pending_segments) >= self._last_batch_size, BATCH_WAIT_SECONDS
                    )
                if self._closed:
                    break
                readings, texts = len(self._pending_segments), len(self._waiting) + len(self._running)
                batch = self._next_batch() if self._scoring_excess_seconds <= 0 or not texts else []
            began = time.perf_counter()
            # All that wait have the same claim to the time, whether a segment or a text is what they wait for.
            claim = texts / max(readings + texts, 1)
            if batch:
                self._last_batch_size = len(batch)
                self._score_batch(batch)
                self._scoring_excess_seconds += claim * (time.perf_counter() - began)
            elif texts:
                self._decode_step()
                self._scoring_excess_seconds -= (1 - claim) * (time.perf_counter() - began)
        error = ClosedError("The engine was closed.", "Ask again when it is back.")
        for one in self._pending_segments:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(error)
        for text in (*self._running, *self._waiting):
            text.output_queue.put(error)

    def _next_batch(self) -> list[PendingSegment]:
        """Take out the segment whose turn it is and those that go with it."""
        waiting = sorted(
            (one for one in self._pending_segments if not one.future.cancelled()), key=lambda one: one.arrival_time
        )
        places: set[int] = set()
        if waiting:
            readings = [one.request for one in waiting]
            spared = padding_limit(len(readings[0].tokens), self._is_cpu)
            places = set(
                select_batch(
                    readings,
                    max_tokens=self.max_batch_tokens,
                    max_padding=spared,
                    supports_padding=self.model.supports_padding,
                )
            )
        self._pending_segments = [one for place, one in enumerate(waiting) if place not in places]
        taken = (one for place, one in enumerate(waiting) if place in places)
        return [one for one in taken if one.future.set_running_or_notify_cancel()]

    def _score_batch(self, batch: list[PendingSegment]) -> None:
        try:
            results = score_segments(self.model, [one.request for one in batch])
        except Exception as error:  # A caller's problem, never the thread's end.
            for one in batch:
                one.future.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            one.future.set_result(result)
        self.counters["score_calls"] += 1
        self.counters["score_segments"] += len(batch)
        self.counters["score_tokens"] += sum(len(one.request.tokens) for one in batch)

    def _decode_step(self) -> None:
        try:
            self._update_running()
            if not self._running:
                return
            assert self._decoder is not None
            device = self._decoder.device
            tokens = torch.tensor([text.token_generator.next_token for text in self._running], device=device)
            logits = self._decoder.step(tokens).float().cpu()
            self.counters["decode_calls"] += 1
            self.counters["decode_tokens"] += len(self._running)
        except Exception as error:
            for text in self._running:
                text.output_queue.put(error)
            self._running, self._decoder = [], None
            return
        for text, row in zip(self._running, logits, strict=True):
            self._advance(text, row)

    def _update_running(self) -> None:
        """Let rows go whose texts have ended, and those in that wait."""
        kept = [
            row
            for row, text in enumerate(self._running)
            if text.token_generator.finish_reason is None and not text.is_cancelled
        ]
        for text in self._running:
            if text.is_cancelled and text.token_generator.finish_reason is None:
                text.token_generator.finish_reason = FINISH_CANCELLED
                text.output_queue.put(None)
        if len(kept) < len(self._running):
            assert self._decoder is not None
            kept = _compact_order(kept)
            self._decoder.select(kept)
            self._running = [self._running[row] for row in kept]
        joining: list[MemoryState] = []
        while self._waiting and len(self._running) < self.max_batch_size:
            text = self._waiting.popleft()
            state, text.state = text.state, None
            if text.is_cancelled:
                text.token_generator.finish_reason = FINISH_CANCELLED
                text.output_queue.put(None)
                continue
            assert state is not None
            joining.append(state)
            self._running.append(text)
        if joining:
            if self._decoder is None:
                self._decoder = Decoder(self.model, MemoryState.concat(joining))
            else:
                self._decoder.append(MemoryState.concat(joining))

    def _advance(self, generation: Generation, logits: torch.Tensor) -> None:
        try:
            piece = generation.token_generator.advance(logits)
        except Exception as error:  # This row's problem, not its neighbours'.
            generation.token_generator.finish_reason = FINISH_CANCELLED
            generation.output_queue.put(error)
            return
        if piece.text or piece.token_logprobs:
            generation.output_queue.put(piece)
        if generation.token_generator.finish_reason is not None:
            generation.output_queue.put(None)


def _compact_order(indices: list[int]) -> list[int]:
    """Return the kept rows in an order that moves few: what stands behind fills the holes."""
    stay, behind = set(indices), iter([row for row in indices if row >= len(indices)])
    return [row if row in stay else next(behind) for row in range(len(indices))]
