"""Sessions in a pool equal single readers, and survive errors, eviction and restarts."""

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
from memtx.inference.batching import score_segments
from memtx.inference.deadline import DeadlineExceededError
from memtx.inference.generate import GenerationConfig, generate
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.sessions.pool import SessionPool
from memtx.inference.sessions.registry import SessionLimitError, SessionNotFoundError
from memtx.inference.sessions.store import SessionSaveError
from memtx.memory.none import NoMemory
from tests.inference.conftest import TEXT, tiny_model
from tests.invariants.strategies import distance

EXACT = 1e-10
"""float64: sums in another order."""

ROUNDING = 1e-5
"""nll is returned in float32, and is of the order of 10."""


def sample_text(number: int) -> str:
    return "".join(TEXT[(number * 37 + index * 13) % len(TEXT)] for index in range(130 + 9 * number))


def read_alone(model: MemoryTransformer, text: str, segment_length: int = 32) -> tuple[np.ndarray, StreamReader]:  # type: ignore[type-arg]
    reader = StreamReader(model, ByteTokenizer(), segment_length)
    results = [*reader.feed(text), *reader.finish()]
    return all_nll(results), reader


def all_nll(results: list[SegmentResult]) -> np.ndarray:  # type: ignore[type-arg]
    return np.concatenate([result.nll for result in results])


@pytest.fixture(scope="module")
def exact_model() -> MemoryTransformer:
    return tiny_model(257).double()


@pytest.fixture
def pool(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, tmp_path: Path) -> Iterator[SessionPool]:
    session_pool = SessionPool(byte_model, byte_tokenizer, tmp_path / "sessions", segment_length=32)
    yield session_pool
    session_pool.close()


@settings(max_examples=8)
@given(data=st.data())
def test_sessions_fed_at_once_equal_readers_alone(data: st.DataObject, exact_model: MemoryTransformer) -> None:
    """Sessions are fed at once, in any chunks, by one thread each."""
    count = data.draw(st.integers(2, 6))
    texts = [data.draw(st.text(st.sampled_from("abé🙂 \n"), min_size=1, max_size=300)) for _ in range(count)]
    offsets = [data.draw(st.integers(0, len(text))) for text in texts]
    pool = SessionPool(exact_model, ByteTokenizer(), segment_length=data.draw(st.sampled_from([1, 8, 32])))
    session_ids = [pool.create() for _ in texts]

    def read(session_id: str, text: str, offset: int) -> list[SegmentResult]:
        return pool.feed(session_id, text[:offset]) + pool.feed(session_id, text[offset:], end_of_text=True)

    with ThreadPoolExecutor(count) as threads:
        all_results = list(threads.map(read, session_ids, texts, offsets))
    for session_id, text, results in zip(session_ids, texts, all_results, strict=True):
        expected, reader = read_alone(exact_model, text, pool.segment_length)
        assert np.abs(all_nll(results) - expected).max() < ROUNDING
        with pool.registry.acquire(session_id) as (_, session_reader):
            assert distance(session_reader.state, reader.state) < EXACT
            assert session_reader.totals.num_tokens == reader.totals.num_tokens
    pool.close()


@pytest.mark.parametrize("memory", ["compressed", "none"])
def test_segments_scored_in_one_call_equal_each_alone(memory: str, exact_model: MemoryTransformer) -> None:
    # The engine is blocked until all segments are pending, so that they share calls. A model without memory shows that
    # no segment was split: its results would change.
    model = exact_model
    if memory == "none":
        torch.manual_seed(0)
        model = MemoryTransformer(257, dim=16, depth=1, heads=2, memories=[NoMemory]).double()
    pool = SessionPool(model, ByteTokenizer(), segment_length=32)
    texts = [sample_text(number) for number in range(12)]
    started, released = threading.Event(), threading.Event()
    pool.engine._score_batch = partial(_call_blocked, started, released, pool.engine._score_batch)  # type: ignore[method-assign]
    with ThreadPoolExecutor(len(texts) + 1) as threads:
        first = threads.submit(lambda: list(read_to_end(pool, "x")))
        started.wait(30)
        futures = [threads.submit(lambda text=text: list(read_to_end(pool, text))) for text in texts]
        while pool.engine.num_waiting < len(texts):
            time.sleep(0.001)
        released.set()
        first.result()
        for text, future in zip(texts, futures, strict=True):
            assert np.abs(all_nll(future.result()) - read_alone(model, text)[0]).max() < ROUNDING
    counters = pool.engine.counters
    assert counters["score_tokens"] == 1 + sum(len(text.encode()) for text in texts)
    assert counters["score_segments"] / counters["score_calls"] > 4
    pool.close()


def _call_blocked(
    started: threading.Event, released: threading.Event, function: Callable[[object], None], argument: object
) -> None:
    started.set()
    assert released.wait(30)
    function(argument)


def read_to_end(pool: SessionPool, text: str) -> Iterator[SegmentResult]:
    reader = pool.new_reader()
    yield from reader.feed(text)
    # The state is discarded, so last segments of other lengths can be padded.
    yield from reader.finish(discard_state=True)


def test_texts_generated_at_once_equal_each_alone(pool: SessionPool, byte_model: MemoryTransformer) -> None:
    # float32: equal unless a draw falls within rounding of a border between tokens; for these seeds none does.
    prompts = [sample_text(number)[: 20 + 7 * number] for number in range(8)]
    session_ids = [pool.create() for _ in prompts]
    params = SamplingParams(temperature=0.9, top_k=40, repetition_penalty=1.1)

    def generate_text(session_id: str, prompt: str, seed: int) -> str:
        pool.feed(session_id, prompt)
        (first, second) = pool.generate(
            session_id,
            "",
            [GenerationConfig(30 + seed, params, seed=seed), GenerationConfig(5, params, stop=("e",), seed=seed)],
        )
        list(second)
        return "".join(delta.text for delta in first)

    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(generate_text, session_ids, prompts, range(8)))
    for prompt, text, seed in zip(prompts, texts, range(8), strict=True):
        options = {"max_tokens": 30 + seed, "sampling_params": params, "seed": seed}
        assert text == "".join(generate(byte_model, pool.tokenizer, prompt, segment_length=32, **options))  # type: ignore[arg-type]
    assert pool.engine.counters["decode_tokens"] > pool.engine.counters["decode_calls"]
    assert pool.engine.num_running == 0


def test_more_texts_than_the_batch_size_wait(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, max_batch_size=2)
    configs = [GenerationConfig(4 + number, seed=number) for number in range(7)]
    texts = [list(generation) for generation in pool.start_generation(pool.new_reader(), [], configs)]
    assert all(texts)
    pool.close()


def test_a_generation_can_be_cancelled(pool: SessionPool) -> None:
    session_id = pool.create()
    endless, other = pool.generate(session_id, "It", [GenerationConfig(10**9), GenerationConfig(20)])
    deltas = iter(endless)
    next(deltas)
    endless.cancel()
    assert len(list(other)) > 0
    list(deltas)
    assert endless.token_generator.finish_reason == "cancelled"
    # Closing the iterator cancels too.
    (dropped,) = pool.generate(session_id, "", [GenerationConfig(10**9)])
    deltas = iter(dropped)
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    assert "".join(delta.text for delta in pool.generate(session_id, "", [GenerationConfig(3)])[0])
    assert dropped.token_generator.finish_reason == "cancelled"


def test_requests_end_at_their_deadline(pool: SessionPool) -> None:
    session_id = pool.create()
    (endless,) = pool.generate(session_id, "", [GenerationConfig(10**9)], deadline=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceededError):
        list(endless)
    before = pool.info(session_id)
    with pytest.raises(DeadlineExceededError):
        pool.feed(session_id, TEXT * 100, deadline=time.monotonic() + 0.1)
    assert pool.info(session_id) == before
    with pool.registry.acquire(session_id), pytest.raises(DeadlineExceededError, match="busy"):
        pool.feed(session_id, "x", deadline=time.monotonic() + 0.05)


def test_an_error_leaves_a_session_unchanged(pool: SessionPool) -> None:
    session_id = pool.create()
    pool.feed(session_id, TEXT[:100])
    before = pool.info(session_id)
    with pytest.raises(DataError, match="not UTF-8"):
        pool.feed(session_id, TEXT[:100].encode() + b"\xff")
    assert pool.info(session_id) == before
    results = pool.feed(session_id, TEXT[100:200], end_of_text=True)
    expected, _ = read_alone(pool.model, TEXT[:200])
    # All of the text is scored now: chunks shorter than a thousand characters were pending.
    assert np.abs(all_nll(results) - expected).max() < ROUNDING


def test_an_error_in_one_generation_leaves_the_others_alone(pool: SessionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = pool.create()
    bad, good = pool.generate(session_id, "It", [GenerationConfig(10), GenerationConfig(10)])
    monkeypatch.setattr(bad.token_generator, "accept", lambda sampled: (_ for _ in ()).throw(MemtxError("not finite")))
    with pytest.raises(MemtxError, match="not finite"):
        list(bad)
    assert good.token_generator.finish_reason is None or good.token_generator.num_generated == 10
    assert list(good)


def test_scoring_and_forking_leave_a_session_unchanged(pool: SessionPool) -> None:
    session_id = pool.create()
    pool.feed(session_id, TEXT[:210])
    before = pool.info(session_id)
    totals, results = pool.score(session_id, TEXT[210:250], num_logprobs=3, return_hidden_states=True)
    expected, _ = read_alone(pool.model, TEXT[:250])
    assert np.abs(all_nll(results) - expected[totals.num_tokens :]).max() < ROUNDING
    first = results[0]
    assert first.top_tokens is not None
    assert first.top_logprobs is not None
    assert first.hidden_states is not None
    assert first.top_tokens.shape == (len(first.tokens), 3)
    assert first.hidden_states.shape == (len(first.tokens), 16)
    is_top = first.top_tokens[:, 0] == first.tokens
    assert np.abs(first.top_logprobs[is_top, 0] + first.nll[is_top]).max(initial=0) < ROUNDING
    fork_id = pool.fork(session_id)
    pool.feed(fork_id, "something else entirely", end_of_text=True)
    assert pool.info(session_id) == before
    results = pool.feed(session_id, TEXT[210:250], end_of_text=True)
    assert np.abs(all_nll(results) - expected[totals.num_tokens :]).max() < ROUNDING


def test_a_session_can_append_its_generated_text(pool: SessionPool, byte_model: MemoryTransformer) -> None:
    session_id = pool.create()
    pool.feed(session_id, TEXT[:100])
    text = "".join(delta.text for delta in pool.generate_and_append(session_id, " And", GenerationConfig(20, seed=5)))
    assert text == "".join(
        generate(byte_model, pool.tokenizer, TEXT[:100] + " And", segment_length=32, max_tokens=20, seed=5)
    )
    pool.feed(session_id, "", end_of_text=True)
    full_text = TEXT[:100] + " And" + text
    assert pool.info(session_id).totals.num_bytes == len(full_text.encode())
    expected_nll = float(read_alone(byte_model, full_text)[0].sum())
    assert pool.info(session_id).totals.nll == pytest.approx(expected_nll, rel=1e-5)
    # Closing the iterator leaves the session unchanged.
    before = pool.info(session_id)
    deltas = pool.generate_and_append(session_id, "", GenerationConfig(50))
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    assert pool.info(session_id) == before


def test_a_session_that_cannot_be_saved_is_unchanged(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, tmp_path, segment_length=32)
    session_id = pool.create()
    pool.feed(session_id, TEXT[:100], save=True)
    before = pool.info(session_id)

    def fail(*_: object, **__: object) -> None:
        raise MemtxError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr("memtx.inference.sessions.store.save_session", fail)
        with pytest.raises(SessionSaveError, match="disk is full"):
            pool.feed(session_id, TEXT[100:150], save=True)
    assert pool.info(session_id) == before
    results = pool.feed(session_id, TEXT[100:150], end_of_text=True)
    expected = read_alone(byte_model, TEXT[:150])[0][before.totals.num_tokens :]
    assert np.abs(all_nll(results) - expected).max() < ROUNDING
    pool.close()


def test_idle_sessions_are_evicted_to_disk_and_restored(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, tmp_path, segment_length=32, max_in_memory=2)
    session_ids = [pool.create() for _ in range(5)]
    halves = [(sample_text(number)[:70], sample_text(number)[70:]) for number in range(5)]
    first_results = [pool.feed(session_id, first) for session_id, (first, _) in zip(session_ids, halves, strict=True)]
    assert pool.registry.counts == {"in_memory": 2, "total": 5}
    assert len(list(tmp_path.glob("*.session"))) >= 3
    for session_id, (first, second), results in zip(session_ids, halves, first_results, strict=True):
        results += pool.feed(session_id, second, end_of_text=True)
        # Bit for bit: no other stream shared these calls.
        assert np.array_equal(all_nll(results), read_alone(byte_model, first + second)[0])
    pool.close()
    reopened = SessionPool(byte_model, byte_tokenizer, tmp_path, segment_length=32)
    assert sorted(reopened.session_ids()) == sorted(session_ids)
    assert reopened.registry.counts == {"in_memory": 0, "total": 5}
    assert reopened.info(session_ids[3]).totals == pool.info(session_ids[3]).totals
    reopened.delete(session_ids[3])
    with pytest.raises(SessionNotFoundError):
        reopened.feed(session_ids[3], "x")
    assert not (tmp_path / f"{session_ids[3]}.session").exists()
    reopened.close()


def test_a_folder_belongs_to_one_pool(pool: SessionPool, tmp_path: Path) -> None:
    with pytest.raises(MemtxError, match="used by another server"):
        SessionPool(pool.model, pool.tokenizer, tmp_path / "sessions")


def test_sessions_can_be_exported_and_imported(pool: SessionPool) -> None:
    session_id = pool.create()
    pool.feed(session_id, TEXT[:333])
    content = pool.export_session(session_id)
    imported_id = pool.import_session(content)
    assert imported_id != session_id
    original, imported = (pool.feed(name, "x", end_of_text=True) for name in (session_id, imported_id))
    assert np.array_equal(all_nll(original), all_nll(imported))
    with pytest.raises(CheckpointError, match="The session is not a valid") as raised:
        pool.import_session(content[:-1])
    assert "sessions/" not in str(raised.value)
    assert len(pool.session_ids()) == 2


def test_sessions_are_limited_in_number_and_size(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    pool = SessionPool(byte_model, byte_tokenizer, max_sessions=2)
    session_id = pool.create()
    pool.create()
    with pytest.raises(SessionLimitError, match=r"limit reached \(2\)"):
        pool.create()
    with pytest.raises(SessionLimitError):
        pool.fork(session_id)
    pool.delete(session_id)
    pool.create()
    with pytest.raises(MemtxError, match="no folder"):
        pool.save(pool.session_ids()[0])
    # Two layers with a cache (16 + 3 positions) and a bank (4 entries) of dim 16, and the position.
    assert pool.session_bytes == 2 * (16 + 3 + 4) * 16 * 4 + 8
    assert pool.sessions_per_gb == 10**9 // pool.session_bytes
    pool.close()


def test_an_error_in_a_call_fails_only_its_callers(pool: SessionPool, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = pool.create()

    def fail(*_: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("memtx.inference.engine.score_segments", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pool.feed(session_id, TEXT[:64], end_of_text=True)
    monkeypatch.setattr("memtx.inference.engine.score_segments", score_segments)
    assert pool.feed(session_id, TEXT[:64], end_of_text=True)
