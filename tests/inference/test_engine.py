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


def test_a_long_text_does_not_delay_short_ones(byte_model: MemoryTransformer) -> None:
    # One segment per call, so that the order shows: a book of 40 segments, and short texts that arrive meanwhile.
    engine, order = Engine(byte_model, max_batch_tokens=1), []
    score_batch = engine._score_batch

    def slow_score_batch(batch: list[PendingSegment]) -> None:
        order.append(batch[0].request)
        time.sleep(0.02)
        score_batch(batch)

    engine._score_batch = slow_score_batch  # type: ignore[method-assign]
    tokens, score_book = np.zeros(4, dtype=np.int64), engine.make_score_fn()
    short_requests = [ScoreRequest(byte_model.init_state(1), tokens + 1, tokens) for _ in range(6)]
    with ThreadPoolExecutor(7) as threads:
        book = threads.submit(
            lambda: [score_book(ScoreRequest(byte_model.init_state(1), tokens, tokens)) for _ in range(40)]
        )
        while len(order) < 5:
            time.sleep(0.001)
        for future in [threads.submit(engine.make_score_fn(), request) for request in short_requests]:
            future.result()
        assert not book.done()
        book.result()
    indices = [index for index, request in enumerate(order) if any(request is short for short in short_requests)]
    assert indices[-1] < 5 + 6 + 10, "only a few segments of the book came before each short text"
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
