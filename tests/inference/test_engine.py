"""Scheduling: segments of any length share calls, long texts do not delay others, scoring and generation share time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from memtx import MemoryTransformer
from memtx.data.tokenizers import Tokenizer
from memtx.inference.batching import ScoreRequest
from memtx.inference.deadline import ClosedError
from memtx.inference.engine import Engine, PendingSegment
from memtx.inference.generate import GenerationConfig
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sessions.pool import SessionPool
from tests.invariants.strategies import distance

ROUNDING = 1e-5
"""nll is returned in float32, and is of the order of 10."""


class BlockedEngine:
    """Blocks the engine's calls until all segments are pending, and records their batch sizes."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.score_batch = engine, engine._score_batch
        self.started, self.released = threading.Event(), threading.Event()
        self.batch_sizes: list[int] = []
        monkeypatch.setattr(engine, "_score_batch", self)

    def __call__(self, batch: list[PendingSegment]) -> None:
        self.started.set()
        assert self.released.wait(30)
        self.batch_sizes.append(len(batch))
        self.score_batch(batch)

    def wait_for_pending(self, count: int) -> None:
        while self.engine.num_waiting < count:
            time.sleep(0.001)


def test_last_segments_of_different_lengths_are_scored_together(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each stream continues afterwards, so the padding must leave no trace in its state.
    texts = [chr(ord("a") + number) * (3 + 2 * number) for number in range(8)]
    pool = SessionPool(byte_model, byte_tokenizer, segment_length=32)
    session_ids = [pool.create() for _ in texts]
    blocked = BlockedEngine(pool.engine, monkeypatch)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(pool.feed, pool.create(), "z", end_of_text=True)
        assert blocked.started.wait(30)
        futures = [
            threads.submit(pool.feed, session_id, text, end_of_text=True)
            for session_id, text in zip(session_ids, texts, strict=True)
        ]
        blocked.wait_for_pending(8)
        blocked.released.set()
        first.result()
    assert blocked.batch_sizes == [1, 8]
    for session_id, text, future in zip(session_ids, texts, futures, strict=True):
        reader = StreamReader(byte_model, byte_tokenizer, 32)
        assert np.abs(all_nll(future.result()) - all_nll(feed(reader, text))).max() < ROUNDING
        with pool.registry.acquire(session_id) as (_, session_reader):
            assert distance(session_reader.state, reader.state) < 1e-4
        continued = pool.feed(session_id, "on", end_of_text=True)
        assert np.abs(all_nll(continued) - all_nll(feed(reader, "on"))).max() < ROUNDING
    pool.close()


def feed(reader: StreamReader, text: str) -> list[SegmentResult]:
    return [*reader.feed(text), *reader.finish()]


def all_nll(results: list[SegmentResult]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([result.nll for result in results])


def count_tokens(engine: Engine) -> list[int]:
    """Let every call take one segment and 5 ms, and return a list of the tokens of each call, marked by their value."""
    calls, score_batch = [], engine._score_batch

    def slow_score_batch(batch: list[PendingSegment]) -> None:
        calls.extend(batch[0].request.tokens.tolist())
        time.sleep(0.005)
        score_batch(batch)

    engine._score_batch = slow_score_batch  # type: ignore[method-assign]
    return calls


def read_text(engine: Engine, number: int, segment_length: int, num_segments: int) -> None:
    """Score the segments of one text, whose tokens are all ``number``."""
    tokens = np.full(segment_length, number, dtype=np.int64)
    score_fn = engine.make_score_fn()
    for _ in range(num_segments):
        score_fn(ScoreRequest(engine.model.init_state(1), tokens, tokens, discard_state=True))


def test_a_short_text_waits_in_proportion_to_its_length(byte_model: MemoryTransformer) -> None:
    engine = Engine(byte_model, max_batch_tokens=1)
    calls = count_tokens(engine)
    with ThreadPoolExecutor(12) as threads:
        books = [threads.submit(read_text, engine, 0, 40, 16) for _ in range(12)]
        while calls.count(0) < 40 * 30:
            time.sleep(0.001)
        waits = []
        for _ in range(5):
            before = len(calls)
            read_text(engine, 1, 2, 1)
            waits.append(calls[before:].count(0) / 40)
        assert not any(book.done() for book in books)
    # Its share, 2 tokens of each book, and the calls in progress when it arrives and when the books submit again.
    assert sorted(waits)[2] <= 4, "calls of other texts before a short one, of 12 that were waiting"
    engine.close()


def test_short_texts_without_end_leave_a_long_one_its_share(byte_model: MemoryTransformer) -> None:
    engine, is_done = Engine(byte_model, max_batch_tokens=1), threading.Event()
    calls = count_tokens(engine)

    def read_short_texts(number: int) -> None:
        while not is_done.is_set():
            read_text(engine, number, 8, 1)

    with ThreadPoolExecutor(5) as threads:
        for number in range(1, 5):
            threads.submit(read_short_texts, number)
        threads.submit(read_text, engine, 0, 64, 4).result()
        is_done.set()
    share = calls.count(0) / len(calls)
    # One of five texts; the model alternates between them, so that the last call of each may or may not count.
    assert 0.13 < share < 0.45
    engine.close()


def test_scoring_and_generation_share_the_time(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, segment_length=8)
    score_batch = pool.engine._score_batch
    # A call takes as long as many decoding steps: if they alternated, generation would get one token per call.
    pool.engine._score_batch = lambda batch: (time.sleep(0.1), score_batch(batch))[1]  # type: ignore[method-assign]
    (endless,) = pool.start_generation(pool.new_reader(), [], [GenerationConfig(10**9)])
    before = dict(pool.engine.counters)
    pool.feed(pool.create(), "a" * 80, end_of_text=True)
    calls, steps = (pool.engine.counters[name] - before[name] for name in ("score_calls", "decode_calls"))
    assert calls == 10
    assert steps > 2 * calls
    endless.cancel()
    pool.close()


def test_requests_to_a_closed_engine_fail(byte_model: MemoryTransformer) -> None:
    engine = Engine(byte_model)
    state = byte_model.init_state(1)
    engine.close()
    with pytest.raises(ClosedError):
        engine.generate(state, None)  # type: ignore[arg-type]
