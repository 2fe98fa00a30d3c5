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

from memtx.errors import MemtxError
from memtx.inference.batch import chosen, spare, usual_tokens
from memtx.inference.continuation import Continuation, Piece
from memtx.inference.decoder import Decoder
from memtx.inference.scoring import Reading, Scored, score
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

CANCELLED = "cancelled"

GATHERING = 0.002
"""Seconds that streams just served have to ask again before a call is made without them: without it, the first to
wake would be read alone and the others after it. Far less than a call of a model of any use takes."""

KEPT = 0.8
"""Of the time that a request has waited for its segment, the share by which its next one goes before those that come
now. At 0 a text of several segments would line up anew with each, and its time would be as uncertain as all its turns
together; at 1 those who come while long texts are read would wait for all of these. So they wait for 1 / (1 - 0.8)
segments of each at most."""


class OutOfTimeError(MemtxError):
    """A request took longer than it may."""


class ClosedError(MemtxError):
    """The engine was closed while a request was waiting."""


def seconds_left(deadline: float | None) -> float | None:
    """Return the seconds until ``deadline``, a time of ``time.monotonic``; None for no end.

    Raises:
        OutOfTimeError: it has passed.
    """
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise OutOfTimeError("The request took longer than it may.", "Ask for less at once.")
    return left


Arrival = Piece | BaseException | None
"""A piece; an error, after which nothing comes; or None for the end."""


class Arrivals(Protocol):
    """Where the engine's thread puts what it made; must not block."""

    def put(self, item: Arrival) -> None:
        """Take a piece, an error or the end."""
        ...


class Generation:
    """A text that is being made: an iterator over its pieces, for one thread; the engine's thread fills it.

    Attributes:
        text: what decides about tokens; its ``finish`` says why it ended, its ``made`` how many tokens there are.
    """

    def __init__(
        self, state: MemoryState, text: Continuation, deadline: float | None, arrived: Arrivals | None = None
    ) -> None:
        self.state: MemoryState | None = state
        self.text = text
        self.deadline = deadline
        self.cancelled = False
        self.queue: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self.arrived: Arrivals = arrived if arrived is not None else self.queue

    def cancel(self) -> None:
        """End it before the next token; may be called from any thread, at any time."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        """Yield the pieces, as they come.

        Raises:
            OutOfTimeError: its deadline passed; it is cancelled.
            MemtxError: the model's logits were not finite, or the engine was closed.
        """
        try:
            while True:
                try:
                    piece = self.queue.get(timeout=seconds_left(self.deadline))
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
class Waiting:
    """A segment that waits to be read; the one of the earliest turn, a time of ``time.monotonic``, is the next."""

    reading: Reading
    turn: float
    future: Future[Scored] = field(default_factory=Future)


class Engine:
    """Runs a model for many streams at once.

    Args:
        model: in eval mode; nothing else may use it while a compiled or captured step runs.
        rows: texts that go on at once; more wait.
        batch_tokens: tokens read in one call at most, where that is more than one segment; by default what suits the
            model's device.

    Attributes:
        calls: how many calls of each kind there were, and how many rows and tokens they had together.
    """

    def __init__(self, model: MemoryTransformer, *, rows: int = 64, batch_tokens: int | None = None) -> None:
        self._on_cpu = model.embedding.weight.device.type == "cpu"
        batch_tokens = usual_tokens(self._on_cpu) if batch_tokens is None else batch_tokens
        for name, number in (("rows", rows), ("batch_tokens", batch_tokens)):
            if number < 1:
                raise MemtxError(f"{name} is {number}, expected at least 1.")
        self.model = model
        self.rows = rows
        self.batch_tokens = batch_tokens
        self.calls = {"read": 0, "read_rows": 0, "read_tokens": 0, "step": 0, "step_rows": 0}
        self._changed = threading.Condition()
        self._readings: list[Waiting] = []
        self._joining: deque[Generation] = deque()
        self._texts: list[Generation] = []
        self._decoder: Decoder | None = None
        self._served = 1
        # Seconds that those who are read have had beyond their share.
        self._owed = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memtx-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Segments and texts that wait for a call."""
        return len(self._readings) + len(self._joining)

    @property
    def decoding(self) -> int:
        """Texts that go on now."""
        return len(self._texts)

    def scorer(self, deadline: float | None = None) -> Callable[[Reading], Scored]:
        """Return what reads one request's segments, one after the other; raises what :meth:`score` does."""
        turn: float | None = None

        def score_next(reading: Reading) -> Scored:
            nonlocal turn
            now = time.monotonic()
            turn = now if turn is None else now - KEPT * (now - turn)
            return self.score(reading, deadline, turn)

        return score_next

    def score(self, reading: Reading, deadline: float | None = None, turn: float | None = None) -> Scored:
        """Read one segment, together with those that others wait for.

        Args:
            reading: the segment.
            deadline: a time of ``time.monotonic``.
            turn: likewise, as of when it waits; by default from now on.

        Raises:
            OutOfTimeError: the deadline passed first; the segment is not read.
            ClosedError: the engine was closed.
        """
        waiting = Waiting(reading, time.monotonic() if turn is None else turn)
        left = seconds_left(deadline)
        with self._changed:
            self._check_open()
            self._readings.append(waiting)
            self._changed.notify()
        try:
            return waiting.future.result(timeout=left)
        except TimeoutError:
            waiting.future.cancel()
            raise OutOfTimeError("The request took longer than it may.", "Ask for less at once.") from None

    def generate(
        self,
        state: MemoryState,
        text: Continuation,
        deadline: float | None = None,
        arrived: Arrivals | None = None,
    ) -> Generation:
        """Begin to make a text; returns at once.

        Args:
            state: where the stream stands, one row; ``text.token`` is read next.
            text: what decides about tokens.
            deadline: a time of ``time.monotonic`` at which it is cancelled.
            arrived: where pieces go instead of the generation's own iterator, which then has none.
        """
        generation = Generation(state, text, deadline, arrived)
        with self._changed:
            self._check_open()
            if text.finish is None:
                self._joining.append(generation)
                self._changed.notify()
            else:
                generation.arrived.put(None)
        return generation

    def close(self) -> None:
        """Stop after the call that runs now; what waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The engine is closed.", "Make a new one.")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._readings or self._joining or self._texts)
                if len(self._readings) < self._served and not self._texts:
                    self._changed.wait_for(lambda: self._closed or len(self._readings) >= self._served, GATHERING)
                if self._closed:
                    break
                readings, texts = len(self._readings), len(self._joining) + len(self._texts)
                batch = self._next_batch() if self._owed <= 0 or not texts else []
            began = time.perf_counter()
            # All that wait have the same claim to the time, whether a segment or a text is what they wait for.
            claim = texts / max(readings + texts, 1)
            if batch:
                self._served = len(batch)
                self._read(batch)
                self._owed += claim * (time.perf_counter() - began)
            elif texts:
                self._step()
                self._owed -= (1 - claim) * (time.perf_counter() - began)
        error = ClosedError("The engine was closed.", "Ask again when it is back.")
        for one in self._readings:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(error)
        for text in (*self._texts, *self._joining):
            text.arrived.put(error)

    def _next_batch(self) -> list[Waiting]:
        """Take out the segment whose turn it is and those that go with it."""
        waiting = sorted((one for one in self._readings if not one.future.cancelled()), key=lambda one: one.turn)
        places: set[int] = set()
        if waiting:
            readings = [one.reading for one in waiting]
            spared = spare(len(readings[0].inputs), self._on_cpu)
            places = set(chosen(readings, tokens=self.batch_tokens, spare=spared, padded=self.model.padded))
        self._readings = [one for place, one in enumerate(waiting) if place not in places]
        taken = (one for place, one in enumerate(waiting) if place in places)
        return [one for one in taken if one.future.set_running_or_notify_cancel()]

    def _read(self, batch: list[Waiting]) -> None:
        try:
            results = score(self.model, [one.reading for one in batch])
        except Exception as error:  # A caller's problem, never the thread's end.
            for one in batch:
                one.future.set_exception(error)
            return
        for one, result in zip(batch, results, strict=True):
            one.future.set_result(result)
        self.calls["read"] += 1
        self.calls["read_rows"] += len(batch)
        self.calls["read_tokens"] += sum(len(one.reading.inputs) for one in batch)

    def _step(self) -> None:
        try:
            self._admit()
            if not self._texts:
                return
            assert self._decoder is not None
            device = self._decoder.device
            tokens = torch.tensor([text.text.token for text in self._texts], device=device)
            logits = self._decoder.step(tokens).float().cpu()
            self.calls["step"] += 1
            self.calls["step_rows"] += len(self._texts)
        except Exception as error:
            for text in self._texts:
                text.arrived.put(error)
            self._texts, self._decoder = [], None
            return
        for text, row in zip(self._texts, logits, strict=True):
            self._advance(text, row)

    def _admit(self) -> None:
        """Let rows go whose texts have ended, and those in that wait."""
        kept = [row for row, text in enumerate(self._texts) if text.text.finish is None and not text.cancelled]
        for text in self._texts:
            if text.cancelled and text.text.finish is None:
                text.text.finish = CANCELLED
                text.arrived.put(None)
        if len(kept) < len(self._texts):
            assert self._decoder is not None
            kept = _filled(kept)
            self._decoder.select(kept)
            self._texts = [self._texts[row] for row in kept]
        joining: list[MemoryState] = []
        while self._joining and len(self._texts) < self.rows:
            text = self._joining.popleft()
            state, text.state = text.state, None
            if text.cancelled:
                text.text.finish = CANCELLED
                text.arrived.put(None)
                continue
            assert state is not None
            joining.append(state)
            self._texts.append(text)
        if joining:
            if self._decoder is None:
                self._decoder = Decoder(self.model, MemoryState.concat(joining))
            else:
                self._decoder.join(MemoryState.concat(joining))

    def _advance(self, text: Generation, logits: torch.Tensor) -> None:
        try:
            piece = text.text.advance(logits)
        except Exception as error:  # This row's problem, not its neighbours'.
            text.text.finish = CANCELLED
            text.arrived.put(error)
            return
        if piece.text or piece.tokens:
            text.arrived.put(piece)
        if text.text.finish is not None:
            text.arrived.put(None)


def _filled(kept: list[int]) -> list[int]:
    """Return the kept rows in an order that moves few: what stands behind fills the holes."""
    stay, behind = set(kept), iter([row for row in kept if row >= len(kept)])
    return [row if row in stay else next(behind) for row in range(len(kept))]
