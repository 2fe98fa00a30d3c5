"""Whose turn it is: rows of other lengths share a call, long texts hold up nobody, reading and making share time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from memtx import MemoryTransformer
from memtx.data.tokenizers import Tokenizer
from memtx.inference.engine import ClosedError, Engine, PendingSegment
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.scoring import ScoreRequest
from memtx.inference.sessions.pool import SessionPool
from memtx.inference.token_generator import GenerationConfig
from tests.invariants.strategies import distance

ROUNDED = 1e-5
"""Surprise is handed out in float32, and is of the order of 10."""


class Held:
    """Holds the engine's calls until all that is to be read waits, and takes down how many rows they had."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.read = engine, engine._score_batch
        self.began, self.go = threading.Event(), threading.Event()
        self.rows: list[int] = []
        monkeypatch.setattr(engine, "_score_batch", self)

    def __call__(self, batch: list[PendingSegment]) -> None:
        self.began.set()
        assert self.go.wait(30)
        self.rows.append(len(batch))
        self.read(batch)

    def wait(self, count: int) -> None:
        while self.engine.num_waiting < count:
            time.sleep(0.001)


def test_ends_of_other_lengths_are_read_together(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each goes on afterwards, so what was filled up must have left no trace.
    texts = [chr(ord("a") + number) * (3 + 2 * number) for number in range(8)]
    pool = SessionPool(byte_model, byte_tokenizer, segment_length=32)
    names = [pool.create() for _ in texts]
    held = Held(pool.engine, monkeypatch)
    with ThreadPoolExecutor(9) as threads:
        first = threads.submit(pool.feed, pool.create(), "z", end_of_text=True)
        assert held.began.wait(30)
        fed = [threads.submit(pool.feed, name, text, end_of_text=True) for name, text in zip(names, texts, strict=True)]
        held.wait(8)
        held.go.set()
        first.result()
    assert held.rows == [1, 8]
    for name, text, one in zip(names, texts, fed, strict=True):
        reader = StreamReader(byte_model, byte_tokenizer, 32)
        assert np.abs(surprise(one.result()) - surprise(fed_to(reader, text))).max() < ROUNDED
        with pool.registry.acquire(name) as (_, own):
            assert distance(own.state, reader.state) < 1e-4
        assert (
            np.abs(surprise(pool.feed(name, "on", end_of_text=True)) - surprise(fed_to(reader, "on"))).max() < ROUNDED
        )
    pool.close()


def fed_to(reader: StreamReader, text: str) -> list[SegmentResult]:
    return [*reader.feed(text), *reader.finish()]


def surprise(results: list[SegmentResult]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([result.nll for result in results])


def test_a_long_text_does_not_keep_short_ones_waiting(byte_model: MemoryTransformer) -> None:
    # One segment a call, so that the order shows: a book of 40 segments, then short texts that come while it is read.
    engine, order = Engine(byte_model, max_batch_tokens=1), []
    read = engine._score_batch

    def slow(batch: list[PendingSegment]) -> None:
        order.append(batch[0].request)
        time.sleep(0.02)
        read(batch)

    engine._score_batch = slow  # type: ignore[method-assign]
    tokens = np.zeros(4, dtype=np.int64)
    mine, book = [ScoreRequest(byte_model.init_state(1), tokens + 1, tokens) for _ in range(6)], engine.make_score_fn()
    with ThreadPoolExecutor(7) as threads:
        long = threads.submit(lambda: [book(ScoreRequest(byte_model.init_state(1), tokens, tokens)) for _ in range(40)])
        while len(order) < 5:
            time.sleep(0.001)
        for one in [threads.submit(engine.make_score_fn(), short) for short in mine]:
            one.result()
        assert not long.done()
        long.result()
    places = [place for place, one in enumerate(order) if any(one is short for short in mine)]
    assert places[-1] < 5 + 6 + 10, "of the book, a few segments at most went before each"
    engine.close()


def test_who_reads_and_who_makes_share_the_time(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, segment_length=8)
    read = pool.engine._score_batch
    # A call that takes as long as many steps: in turns, a text that is made would get one token in all that time.
    pool.engine._score_batch = lambda batch: (time.sleep(0.1), read(batch))[1]  # type: ignore[method-assign]
    (endless,) = pool.start_generation(pool.new_reader(), [], [GenerationConfig(10**9)])
    before = dict(pool.engine.counters)
    pool.feed(pool.create(), "a" * 80, end_of_text=True)
    calls, steps = (pool.engine.counters[kind] - before[kind] for kind in ("score_calls", "decode_calls"))
    assert calls == 10
    assert steps > 2 * calls
    endless.cancel()
    pool.close()


def test_what_waits_fails_when_the_engine_is_closed(byte_model: MemoryTransformer) -> None:
    engine = Engine(byte_model)
    state = byte_model.init_state(1)
    engine.close()
    with pytest.raises(ClosedError):
        engine.generate(state, None)  # type: ignore[arg-type]
