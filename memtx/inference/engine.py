"""Engine: one thread that runs a model for many streams, with continuous batching (Yu et al. 2022, section 3).

Texts that are read get equal shares of the tokens per second by weighted fair queueing (Demers et al. 1989): the
segment is next that would be complete first if all texts were read at once. So a text waits in proportion to its own
length, however long the others are.

Pending segments are scored in one call, and running generations advance in one decoding step. Segments are never split
to fit a batch, so each stream is read as it would be alone; shorter segments are padded if the model allows it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from memtx.errors import MemtxError, check_at_least
from memtx.inference.batching import (
    ScoreOutput,
    ScoreRequest,
    accepts_padding,
    default_batch_tokens,
    padding_limit,
    score_segments,
    select_batch,
)
from memtx.inference.deadline import ClosedError, DeadlineExceededError, remaining_seconds
from memtx.inference.decoder import Decoder
from memtx.inference.generate import TextDelta, TokenGenerator
from memtx.inference.sampling import SampledToken, sample_batch
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.state import MemoryState

BATCH_WAIT_SECONDS = 0.002
"""Time for the streams of the last call to submit their next segments, so that the first to wake is not scored alone.
It is far shorter than a call of a useful model."""

QueueItem = TextDelta | BaseException | None
"""Output of a generation: text, then None at the end; an error ends it too."""

OutputFn = Callable[[QueueItem], object]
"""Receives the output of a generation on the engine's thread; must not block."""


class Generation:
    """A text being generated: an iterator over its parts, for one thread. ``token_generator`` chooses the tokens."""

    def __init__(self, token_generator: TokenGenerator, deadline: float | None, on_output: OutputFn | None) -> None:
        self.token_generator, self.deadline = token_generator, deadline
        self.is_cancelled = False
        self._queue: queue.SimpleQueue[QueueItem] = queue.SimpleQueue()
        self.on_output: OutputFn = on_output or self._queue.put

    def cancel(self) -> None:
        """Stop before the next token; can be called from any thread."""
        self.is_cancelled = True

    def finish_cancelled(self, error: BaseException | None = None) -> None:
        """Report that the text ends incomplete, with an optional error; called by the engine."""
        self.token_generator.finish_reason = "cancelled"
        self.on_output(error)

    def __iter__(self) -> Iterator[TextDelta]:
        """Yield the parts of the text as they are generated.

        Raises DeadlineExceededError and cancels the generation at the deadline, and MemtxError if the logits were not
        finite or the engine was closed.
        """
        try:
            while True:
                try:
                    output = self._queue.get(timeout=remaining_seconds(self.deadline))
                except queue.Empty:
                    continue  # remaining_seconds raises next.
                if output is None:
                    return
                if isinstance(output, BaseException):
                    raise output
                yield output
        finally:
            self.cancel()


@dataclass(frozen=True)
class PendingSegment:
    """A segment waiting to be scored; the lowest ``finish`` is scored next.

    ``finish`` is the number of tokens that every text would have been given since the start of the engine, at equal
    shares, when this segment is complete.
    """

    request: ScoreRequest
    finish: float
    future: Future[ScoreOutput] = field(default_factory=Future)


class Engine:
    """Runs a model for many streams at once; ``counters`` counts calls, and the segments and tokens in them.

    Args:
        model: Model in eval mode; nothing else may use it while the engine runs.
        max_batch_size: Maximum number of texts generated at once; others wait.
        max_batch_tokens: Maximum number of tokens scored in one call, unless a single segment is longer. Defaults to a
            value for the model's device.
    """

    def __init__(
        self, model: RecurrentLanguageModel, *, max_batch_size: int = 64, max_batch_tokens: int | None = None
    ) -> None:
        self._is_cpu = model.init_state(1).position.device.type == "cpu"
        max_batch_tokens = default_batch_tokens(self._is_cpu) if max_batch_tokens is None else max_batch_tokens
        check_at_least(1, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens)
        self.model, self.max_batch_size, self.max_batch_tokens = model, max_batch_size, max_batch_tokens
        counters = ("score_calls", "score_segments", "score_tokens", "decode_calls", "decode_tokens")
        self.counters = dict.fromkeys(counters, 0)
        self._condition = threading.Condition()
        self._pending_segments: list[PendingSegment] = []
        # The virtual time of fair queueing.
        self._tokens_per_text = 0.0
        self._waiting: deque[tuple[Generation, MemoryState]] = deque()
        self._running: list[Generation] = []
        self._decoder: Decoder | None = None
        self._last_batch_size = 1
        # Compute time that scoring used beyond its share.
        self._scoring_excess_seconds = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memtx-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of segments and generations waiting for a call."""
        return len(self._pending_segments) + len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of texts being generated."""
        return len(self._running)

    def make_score_fn(self, deadline: float | None = None) -> Callable[[ScoreRequest], ScoreOutput]:
        """Return a blocking function that scores the segments of one text in order, batched with other streams.

        It raises DeadlineExceededError after ``deadline`` (``time.monotonic``), and ClosedError.
        """
        finish = 0.0

        def score_next(request: ScoreRequest) -> ScoreOutput:
            nonlocal finish
            with self._condition:
                finish = max(finish, self._tokens_per_text) + len(request.tokens)
            return self._score(request, deadline, finish)

        return score_next

    def _score(self, request: ScoreRequest, deadline: float | None, finish: float) -> ScoreOutput:
        pending, timeout = PendingSegment(request, finish), remaining_seconds(deadline)
        with self._condition:
            self._check_open()
            self._pending_segments.append(pending)
            self._condition.notify()
        try:
            return pending.future.result(timeout)
        except TimeoutError:
            pending.future.cancel()
            raise DeadlineExceededError from None

    def generate(
        self,
        state: MemoryState,
        token_generator: TokenGenerator,
        deadline: float | None = None,
        on_output: OutputFn | None = None,
    ) -> Generation:
        """Start generating a text from a state of batch size 1; return immediately, or raise ClosedError.

        ``on_output``, if given, receives the output instead of the returned iterator, which raises at ``deadline``.
        """
        generation = Generation(token_generator, deadline, on_output)
        with self._condition:
            self._check_open()
            if token_generator.finish_reason is None:
                self._waiting.append((generation, state))
                self._condition.notify()
            else:
                generation.on_output(None)
        return generation

    def close(self) -> None:
        """Stop after the current call; all pending requests fail with ClosedError."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The engine is closed.", "Create a new one.")

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self.num_waiting or self._running)
                if not self._running:
                    self._condition.wait_for(
                        lambda: self._closed or len(self._pending_segments) >= self._last_batch_size, BATCH_WAIT_SECONDS
                    )
                if self._closed:
                    break
                num_segments, num_texts = len(self._pending_segments), len(self._waiting) + len(self._running)
                batch = self._next_batch() if self._scoring_excess_seconds <= 0 or not num_texts else []
            start = time.perf_counter()
            # Every pending segment and every text gets an equal share of compute time.
            text_share = num_texts / max(num_segments + num_texts, 1)
            if batch:
                self._last_batch_size = len(batch)
                self._score_batch(batch)
                self._scoring_excess_seconds += text_share * (time.perf_counter() - start)
            elif num_texts:
                self._decode_step()
                self._scoring_excess_seconds -= (1 - text_share) * (time.perf_counter() - start)
        error = ClosedError("The engine was closed.", "Retry when the server is back.")
        for pending in self._pending_segments:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(error)
        for generation in (*self._running, *(generation for generation, _ in self._waiting)):
            generation.on_output(error)

    def _next_batch(self) -> list[PendingSegment]:
        """Remove and return the next segment and the segments to score with it."""
        pending = [segment for segment in self._pending_segments if not segment.future.cancelled()]
        pending.sort(key=lambda segment: segment.finish)
        selected: list[int] = []
        if requests := [segment.request for segment in pending]:
            max_padding = padding_limit(len(requests[0].tokens), self._is_cpu)
            limits = {"max_tokens": self.max_batch_tokens, "max_padding": max_padding}
            selected = select_batch(requests, supports_padding=accepts_padding(self.model), **limits)
        batch = [pending[index] for index in selected]
        self._tokens_per_text += sum(len(segment.request.tokens) for segment in batch) / max(len(pending), 1)
        self._pending_segments = [pending[index] for index in sorted(set(range(len(pending))).difference(selected))]
        return [segment for segment in batch if segment.future.set_running_or_notify_cancel()]

    def _score_batch(self, batch: list[PendingSegment]) -> None:
        try:
            outputs = score_segments(self.model, [segment.request for segment in batch])
        except Exception as error:  # Raised in the callers; the thread continues.
            for segment in batch:
                segment.future.set_exception(error)
            return
        for segment, output in zip(batch, outputs, strict=True):
            segment.future.set_result(output)
        self.counters["score_calls"] += 1
        self.counters["score_segments"] += len(batch)
        self.counters["score_tokens"] += sum(len(segment.request.tokens) for segment in batch)

    def _decode_step(self) -> None:
        try:
            self._update_running()
            if not self._running:
                return
            assert self._decoder is not None
            next_tokens = [generation.token_generator.next_token for generation in self._running]
            logits = self._decoder.step(torch.tensor(next_tokens, device=self._decoder.device))
            sampling_rows = [generation.token_generator.sampling_row() for generation in self._running]
            # Tokenizers of all texts are the same.
            vocab_size = self._running[0].token_generator.tokenizer.vocab_size
            sampled_tokens = sample_batch(logits, sampling_rows, vocab_size)
            self.counters["decode_calls"] += 1
            self.counters["decode_tokens"] += len(self._running)
        except Exception as error:
            for generation in self._running:
                generation.on_output(error)
            self._running, self._decoder = [], None
            return
        for generation, sampled in zip(self._running, sampled_tokens, strict=True):
            self._advance(generation, sampled)

    def _update_running(self) -> None:
        """Remove finished and cancelled texts from the batch and add waiting ones."""
        indices = []
        for index, generation in enumerate(self._running):
            if generation.token_generator.finish_reason is None and not generation.is_cancelled:
                indices.append(index)
            elif generation.token_generator.finish_reason is None:
                generation.finish_cancelled()
        if len(indices) < len(self._running):
            assert self._decoder is not None
            indices = _compact_order(indices)
            self._decoder.select(indices)
            self._running = [self._running[index] for index in indices]
        new_states: list[MemoryState] = []
        while self._waiting and len(self._running) < self.max_batch_size:
            generation, state = self._waiting.popleft()
            if generation.is_cancelled:
                generation.finish_cancelled()
                continue
            new_states.append(state)
            self._running.append(generation)
        if new_states and self._decoder is not None:
            self._decoder.append(MemoryState.concat(new_states))
        elif new_states:
            self._decoder = Decoder(self.model, MemoryState.concat(new_states))

    def _advance(self, generation: Generation, sampled: SampledToken | MemtxError) -> None:
        try:
            delta = generation.token_generator.accept(sampled)
        except Exception as error:  # Only this text fails.
            generation.finish_cancelled(error)
            return
        if delta.text or delta.token_logprobs:
            generation.on_output(delta)
        if generation.token_generator.finish_reason is not None:
            generation.on_output(None)


def _compact_order(indices: list[int]) -> list[int]:
    """Reorder ascending indices so that few streams move: those at the end fill the gaps."""
    remaining = set(indices)
    moved = iter([index for index in indices if index >= len(indices)])
    return [index if index in remaining else next(moved) for index in range(len(indices))]
