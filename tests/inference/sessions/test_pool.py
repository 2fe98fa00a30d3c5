"""A session in a pool gives what it gives alone, whoever else is there; and it survives what it must."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import MemoryTransformer
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.engine import FINISH_CANCELLED, DeadlineExceededError
from memtx.inference.generate import generate
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.scoring import score_segments
from memtx.inference.sessions.pool import SessionPool
from memtx.inference.sessions.registry import SessionLimitError, SessionNotFoundError
from memtx.inference.token_generator import GenerationConfig
from memtx.memory.none import NoMemory
from tests.inference.conftest import TEXT, tiny_model
from tests.invariants.strategies import distance

EXACT = 1e-10
"""float64: sums in another order."""

ROUNDED = 1e-5
"""Surprise is handed out in float32, and is of the order of 10."""


def text_of(number: int) -> str:
    return "".join(TEXT[(number * 37 + place * 13) % len(TEXT)] for place in range(130 + 9 * number))


def alone(model: MemoryTransformer, text: str, segment: int = 32) -> tuple[np.ndarray, StreamReader]:  # type: ignore[type-arg]
    reader = StreamReader(model, ByteTokenizer(), segment)
    results = [*reader.feed(text), *reader.finish()]
    return surprise(results), reader


def surprise(results: list[SegmentResult]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([result.nll for result in results])


@pytest.fixture(scope="module")
def exact_model() -> MemoryTransformer:
    return tiny_model(257).double()


@pytest.fixture
def pool(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, tmp_path: Path) -> Iterator[SessionPool]:
    made = SessionPool(byte_model, byte_tokenizer, tmp_path / "sessions", segment_length=32)
    yield made
    made.close()


@settings(max_examples=8)
@given(data=st.data())
def test_pooled_equals_alone(data: st.DataObject, exact_model: MemoryTransformer) -> None:
    """Sessions fed at once, in any pieces, by as many threads, some of them on disk in between."""
    count = data.draw(st.integers(2, 6))
    texts = [data.draw(st.text(st.sampled_from("abé🙂 \n"), min_size=1, max_size=300)) for _ in range(count)]
    cuts = [data.draw(st.integers(0, len(text))) for text in texts]
    pool = SessionPool(exact_model, ByteTokenizer(), segment_length=data.draw(st.sampled_from([1, 8, 32])))
    names = [pool.create() for _ in texts]

    def read(name: str, text: str, cut: int) -> list[SegmentResult]:
        return pool.feed(name, text[:cut]) + pool.feed(name, text[cut:], end_of_text=True)

    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(read, names, texts, cuts))
    for name, text, results in zip(names, texts, found, strict=True):
        expected, reader = alone(exact_model, text, pool.segment_length)
        assert np.abs(surprise(results) - expected).max() < ROUNDED
        with pool.registry.acquire(name) as (_, own):
            assert distance(own.state, reader.state) < EXACT
            assert own.totals.num_tokens == reader.totals.num_tokens
    pool.close()


@pytest.mark.parametrize("memory", ["compressed", "none"])
def test_rows_of_one_call_are_what_each_is_alone(memory: str, exact_model: MemoryTransformer) -> None:
    # The engine is given all segments while it is busy, so that they do meet in its calls. A model without memory
    # shows that no segment was cut: there it would matter.
    model = exact_model
    if memory == "none":
        torch.manual_seed(0)
        model = MemoryTransformer(257, dim=16, depth=1, heads=2, memories=[NoMemory]).double()
    pool = SessionPool(model, ByteTokenizer(), segment_length=32)
    texts = [text_of(number) for number in range(12)]
    began, go = threading.Event(), threading.Event()
    pool.engine._score_batch = partial(_held, began, go, pool.engine._score_batch)  # type: ignore[method-assign]
    with ThreadPoolExecutor(len(texts) + 1) as threads:
        first = threads.submit(lambda: list(pool_read(pool, "x")))
        began.wait(30)
        waiting = [threads.submit(lambda text=text: list(pool_read(pool, text))) for text in texts]
        while pool.engine.num_waiting < len(texts):
            time.sleep(0.001)
        go.set()
        first.result()
        for text, one in zip(texts, waiting, strict=True):
            assert np.abs(surprise(one.result()) - alone(model, text)[0]).max() < ROUNDED
    calls = pool.engine.counters
    assert calls["score_tokens"] == 1 + sum(len(text.encode()) for text in texts)
    assert calls["score_segments"] / calls["score_calls"] > 4
    pool.close()


def _held(began: threading.Event, go: threading.Event, function: Callable[[object], None], argument: object) -> None:
    began.set()
    assert go.wait(30)
    function(argument)


def pool_read(pool: SessionPool, text: str) -> Iterator[SegmentResult]:
    reader = pool.new_reader()
    yield from reader.feed(text)
    # Nothing goes on from here, so tails of other lengths may be filled up.
    yield from reader.finish(discard_state=True)


def test_texts_made_at_once_are_what_each_is_alone(pool: SessionPool, byte_model: MemoryTransformer) -> None:
    # float32: equal but for a draw within rounding of the border of two tokens, which these seeds do not meet.
    prompts = [text_of(number)[: 20 + 7 * number] for number in range(8)]
    names = [pool.create() for _ in prompts]
    how = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)

    def made(name: str, prompt: str, seed: int) -> str:
        pool.feed(name, prompt)
        (first, second) = pool.generate(
            name, "", [GenerationConfig(30 + seed, how, seed=seed), GenerationConfig(5, how, stop=("e",), seed=seed)]
        )
        list(second)
        return "".join(piece.text for piece in first)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(made, names, prompts, range(8)))
    for prompt, text, seed in zip(prompts, found, range(8), strict=True):
        options = {"max_tokens": 30 + seed, "sampling_params": how, "seed": seed}
        assert text == "".join(generate(byte_model, pool.tokenizer, prompt, segment_length=32, **options))  # type: ignore[arg-type]
    assert pool.engine.counters["decode_tokens"] > pool.engine.counters["decode_calls"]
    assert pool.engine.num_running == 0


def test_more_texts_than_rows_wait(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, max_batch_size=2)
    reader = pool.new_reader()
    texts = [
        list(one)
        for one in pool.start_generation(reader, [], [GenerationConfig(4 + one, seed=one) for one in range(7)])
    ]
    assert all(texts)
    pool.close()


def test_a_text_can_be_cancelled(pool: SessionPool) -> None:
    name = pool.create()
    endless, other = pool.generate(name, "It", [GenerationConfig(10**9), GenerationConfig(20)])
    pieces = iter(endless)
    next(pieces)
    endless.cancel()
    assert len(list(other)) > 0
    list(pieces)
    assert endless.token_generator.finish_reason == FINISH_CANCELLED
    # Whoever stops listening cancels.
    (dropped,) = pool.generate(name, "", [GenerationConfig(10**9)])
    listening = iter(dropped)
    next(listening)
    listening.close()  # type: ignore[attr-defined]
    assert "".join(piece.text for piece in pool.generate(name, "", [GenerationConfig(3)])[0])
    assert dropped.token_generator.finish_reason == FINISH_CANCELLED


def test_time_runs_out(pool: SessionPool) -> None:
    name = pool.create()
    (endless,) = pool.generate(name, "", [GenerationConfig(10**9)], deadline=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceededError):
        list(endless)
    before = pool.info(name)
    with pytest.raises(DeadlineExceededError):
        pool.feed(name, TEXT * 100, deadline=time.monotonic() + 0.1)
    assert pool.info(name) == before
    with pool.registry.acquire(name), pytest.raises(DeadlineExceededError, match="busy"):
        pool.feed(name, "x", deadline=time.monotonic() + 0.05)


def test_an_error_leaves_a_session_where_it_was(pool: SessionPool) -> None:
    name = pool.create()
    pool.feed(name, TEXT[:100])
    before = pool.info(name)
    with pytest.raises(DataError, match="not UTF-8"):
        pool.feed(name, TEXT[:100].encode() + b"\xff")
    assert pool.info(name) == before
    again = pool.feed(name, TEXT[100:200], end_of_text=True)
    expected, _ = alone(pool.model, TEXT[:200])
    # Nothing was read so far: where the first piece ends is not known before a thousand characters.
    assert np.abs(surprise(again) - expected).max() < ROUNDED


def test_what_one_row_does_wrong_is_its_own(pool: SessionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = pool.create()
    bad, good = pool.generate(name, "It", [GenerationConfig(10), GenerationConfig(10)])
    monkeypatch.setattr(bad.token_generator, "advance", lambda logits: (_ for _ in ()).throw(MemtxError("not finite")))
    with pytest.raises(MemtxError, match="not finite"):
        list(bad)
    assert good.token_generator.finish_reason is None or good.token_generator.num_generated == 10
    assert list(good)


def test_scoring_and_forking_leave_a_session_alone(pool: SessionPool) -> None:
    name = pool.create()
    pool.feed(name, TEXT[:210])
    before = pool.info(name)
    totals, results = pool.score(name, TEXT[210:250], num_logprobs=3, return_hidden_states=True)
    expected, _ = alone(pool.model, TEXT[:250])
    assert np.abs(surprise(results) - expected[totals.num_tokens :]).max() < ROUNDED
    first = results[0]
    assert first.top_tokens is not None
    assert first.top_logprobs is not None
    assert first.hidden_states is not None
    assert first.top_tokens.shape == (len(first.tokens), 3)
    assert first.hidden_states.shape == (len(first.tokens), 16)
    hit = first.top_tokens[:, 0] == first.tokens
    assert np.abs(first.top_logprobs[hit, 0] + first.nll[hit]).max(initial=0) < ROUNDED
    branch = pool.fork(name)
    pool.feed(branch, "something else entirely", end_of_text=True)
    assert pool.info(name) == before
    assert (
        np.abs(surprise(pool.feed(name, TEXT[210:250], end_of_text=True)) - expected[totals.num_tokens :]).max()
        < ROUNDED
    )


def test_a_session_may_keep_what_it_wrote(pool: SessionPool, byte_model: MemoryTransformer) -> None:
    name = pool.create()
    pool.feed(name, TEXT[:100])
    text = "".join(piece.text for piece in pool.generate_and_append(name, " And", GenerationConfig(20, seed=5)))
    assert text == "".join(
        generate(byte_model, pool.tokenizer, TEXT[:100] + " And", segment_length=32, max_tokens=20, seed=5)
    )
    pool.feed(name, "", end_of_text=True)
    whole = TEXT[:100] + " And" + text
    assert pool.info(name).totals.num_bytes == len(whole.encode())
    assert pool.info(name).totals.nll == pytest.approx(float(alone(byte_model, whole)[0].sum()), rel=1e-5)
    # Whoever stops listening leaves it as it was.
    before = pool.info(name)
    pieces = pool.generate_and_append(name, "", GenerationConfig(50))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert pool.info(name) == before


def test_idle_sessions_go_to_disk_and_come_back(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, tmp_path, segment_length=32, max_in_memory=2)
    names = [pool.create() for _ in range(5)]
    halves = [(text_of(number)[:70], text_of(number)[70:]) for number in range(5)]
    first = [pool.feed(name, half[0]) for name, half in zip(names, halves, strict=True)]
    assert pool.registry.counts == {"in_memory": 2, "total": 5}
    assert len(list(tmp_path.glob("*.session"))) >= 3
    for name, half, results in zip(names, halves, first, strict=True):
        results += pool.feed(name, half[1], end_of_text=True)
        # Bit for bit: no other row shared these calls.
        assert np.array_equal(surprise(results), alone(byte_model, "".join(half))[0])
    pool.close()
    again = SessionPool(byte_model, byte_tokenizer, tmp_path, segment_length=32)
    assert sorted(again.session_ids()) == sorted(names)
    assert again.registry.counts == {"in_memory": 0, "total": 5}
    assert again.info(names[3]).totals == pool.info(names[3]).totals
    again.delete(names[3])
    with pytest.raises(SessionNotFoundError):
        again.feed(names[3], "x")
    assert not (tmp_path / f"{names[3]}.session").exists()
    again.close()


def test_a_folder_is_one_pools(pool: SessionPool, tmp_path: Path) -> None:
    with pytest.raises(MemtxError, match="used by another server"):
        SessionPool(pool.model, pool.tokenizer, tmp_path / "sessions")


def test_sessions_travel(pool: SessionPool) -> None:
    name = pool.create()
    pool.feed(name, TEXT[:333])
    content = pool.export_session(name)
    other = pool.import_session(content)
    assert other != name
    assert np.array_equal(
        surprise(pool.feed(name, "x", end_of_text=True)), surprise(pool.feed(other, "x", end_of_text=True))
    )
    with pytest.raises(CheckpointError, match="The session is not a whole") as raised:
        pool.import_session(content[:-1])
    assert "sessions/" not in str(raised.value)
    assert len(pool.session_ids()) == 2


def test_there_are_limits(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, max_sessions=2)
    name = pool.create()
    pool.create()
    with pytest.raises(SessionLimitError):
        pool.create()
    with pytest.raises(SessionLimitError):
        pool.fork(name)
    pool.delete(name)
    pool.create()
    with pytest.raises(MemtxError, match="no folder"):
        pool.save(pool.session_ids()[0])
    # Two layers of cache (16 + 3 positions) and bank (4) of 16 numbers, and the position.
    assert pool.session_bytes == 2 * (16 + 3 + 4) * 16 * 4 + 8
    assert pool.sessions_per_gb == 10**9 // pool.session_bytes
    pool.close()


def test_a_failing_call_is_its_callers_problem_alone(pool: SessionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = pool.create()

    def failing(*_: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("memtx.inference.engine.score_segments", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.feed(name, TEXT[:64], end_of_text=True)
    monkeypatch.setattr("memtx.inference.engine.score_segments", score_segments)
    assert pool.feed(name, TEXT[:64], end_of_text=True)
