"""A prompt that continues from a cached prefix gives what it gives when it is read alone."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx import MemoryTransformer
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer
from memtx.inference.batching import ScoreOutput
from memtx.inference.deadline import DeadlineExceededError
from memtx.inference.decoder import Decoder
from memtx.inference.reader import StreamReader
from memtx.inference.sessions.pool import SessionPool
from memtx.inference.sessions.prefix_cache import ReadPrompt, read_prompt
from memtx.memory.compressed import CompressedMemory
from memtx.memory.none import NoMemory
from memtx.memory.recurrent import RecurrentMemory
from memtx.ops.cpu.malloc import current_memory_bytes
from tests.data.tokenizer_zoo import CORPUS, backend_json
from tests.inference.conftest import tiny_model

SEGMENT_LENGTH = 16
ROUNDING = 1e-4
"""float32: a segment that shares its call with others is summed in another order."""


def next_logits(model: MemoryTransformer, read: ReadPrompt) -> Tensor:
    return Decoder(model, read.reader.state).step(torch.tensor([read.reader.last_token]))[0]


def read_cold(model: MemoryTransformer, prompt: str, segment_length: int = SEGMENT_LENGTH) -> ReadPrompt:
    return read_prompt(StreamReader(model, ByteTokenizer(), segment_length), prompt)


def new_pool(
    model: MemoryTransformer, folder: Path | None = None, *, max_bytes: int = 1 << 30, disk_bytes: int = 1 << 30
) -> SessionPool:
    sizes = {"prefix_cache_bytes": max_bytes, "prefix_cache_disk_bytes": disk_bytes}
    return SessionPool(model, ByteTokenizer(), folder, segment_length=SEGMENT_LENGTH, **sizes)


def read(pool: SessionPool, prompt: str, namespace: str = "", deadline: float | None = None) -> ReadPrompt:
    return pool.read_prompt(pool.new_reader(deadline=deadline), prompt, namespace=namespace, deadline=deadline)


def random_text(length: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefg \n", k=length))


def model_with(memory: Callable[..., object]) -> MemoryTransformer:
    torch.manual_seed(0)
    return MemoryTransformer(257, dim=16, depth=2, heads=2, memories=[memory]).eval()


MODELS = {
    "compressed": partial(tiny_model, 257),
    "compressed per segment": partial(
        model_with, partial(CompressedMemory, window=16, num_entries=4, compress_per_segment=True)
    ),
    "recurrent": partial(model_with, partial(RecurrentMemory, window=12)),
    "Transformer-XL": partial(model_with, partial(RecurrentMemory, window=12, same_length=False)),
    "none": partial(model_with, NoMemory),
}


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
    tails=st.lists(st.text("xyz", max_size=70), min_size=6, max_size=6),
)
def test_logits_equal_those_of_a_cold_read(name: str, lengths: list[int], tails: list[str]) -> None:
    model = MODELS[name]()
    pool, text = new_pool(model), random_text(150)
    for length, tail in zip(lengths, tails, strict=False):
        for prompt in (text[:length] + tail, text[:length] + tail):
            cold, warm = read_cold(model, prompt), read(pool, prompt)
            assert torch.equal(next_logits(model, warm), next_logits(model, cold))
            assert warm.reader.totals == cold.reader.totals
            assert warm.tokens.tolist() == cold.tokens.tolist()
        assert warm.num_cached_tokens == (len(prompt) if len(prompt) >= 32 else 0)
    pool.close()


def test_half_of_a_new_shared_prefix_is_read_and_all_of_it_the_next_time(byte_model: MemoryTransformer) -> None:
    pool, shared = new_pool(byte_model), random_text(50 * SEGMENT_LENGTH)
    cached = [read(pool, shared + random_text(300, seed)).num_cached_tokens for seed in range(1, 5)]
    assert cached[0] == 0
    assert len(shared) / 2 <= cached[1] < len(shared)
    assert cached[2:] == [len(shared)] * 2
    pool.close()


def test_a_longer_conversation_continues_from_the_last_full_segment(byte_model: MemoryTransformer) -> None:
    pool, text = new_pool(byte_model), random_text(1000)
    for length in range(300, 1000, 90):
        cached = read(pool, text[:length]).num_cached_tokens
        assert cached == (0 if length == 300 else (length - 90) // SEGMENT_LENGTH * SEGMENT_LENGTH)
    pool.close()


def test_a_prompt_adds_few_snapshots(byte_model: MemoryTransformer) -> None:
    pool = new_pool(byte_model)
    read(pool, random_text(200 * SEGMENT_LENGTH + 5))
    assert pool.prefix_cache is not None
    assert pool.prefix_cache.num_snapshots <= 8 + 3
    pool.close()


def test_namespaces_and_models_share_nothing(byte_model: MemoryTransformer, tmp_path: Path) -> None:
    prompt = random_text(100)
    pool = new_pool(byte_model, tmp_path)
    assert read(pool, prompt, "one key").num_cached_tokens == 0
    assert read(pool, prompt, "another key").num_cached_tokens == 0
    assert read(pool, prompt, "one key").num_cached_tokens == 100
    assert pool.prefix_cache is not None
    wide = model_with(partial(CompressedMemory, window=32, compression_rate=4, num_entries=4))
    wide.load_state_dict(byte_model.state_dict())
    other = new_pool(wide)
    other.prefix_cache = pool.prefix_cache
    other.prefix_cache.fingerprint = pool.prefix_cache.fingerprint
    assert read(other, prompt, "one key").num_cached_tokens == 0
    pool.close()
    other.close()


@settings(max_examples=6)
@given(
    prompts=st.lists(
        st.lists(st.sampled_from([[256], list(b"abcdefghijkl"), list(b"xy" * 20)]), max_size=8), min_size=2, max_size=8
    )
)
def test_begin_tokens_within_a_prompt(byte_model: MemoryTransformer, prompts: list[list[list[int]]]) -> None:
    pool = new_pool(byte_model)
    assert pool.tokenizer.bos_token_id == 256
    for prompt in [list(chain.from_iterable(parts)) for parts in prompts + prompts]:
        cold = read_prompt(StreamReader(byte_model, ByteTokenizer(), SEGMENT_LENGTH), prompt)
        warm = pool.read_prompt(pool.new_reader(), prompt)
        assert torch.equal(next_logits(byte_model, warm), next_logits(byte_model, cold))
        assert warm.reader.totals == cold.reader.totals
    assert warm.num_cached_tokens == (len(warm.tokens) if len(warm.tokens) >= 32 else 0)
    pool.close()


def test_a_begin_token_that_begins_no_document_is_another_prefix(byte_model: MemoryTransformer) -> None:
    pool, prompt = new_pool(byte_model), [*b"a" * 40, 256, *b"b" * 10]
    for splits_documents in (True, False):
        cold, warm = StreamReader(byte_model, ByteTokenizer(), SEGMENT_LENGTH), pool.new_reader()
        cold.splits_documents = warm.splits_documents = splits_documents
        expected = next_logits(byte_model, read_prompt(cold, prompt))
        assert torch.equal(next_logits(byte_model, pool.read_prompt(warm, prompt)), expected)
    pool.close()


def test_cut_characters_and_parsed_special_tokens(tmp_path: Path) -> None:
    tokenizer = BytePairTokenizer.from_backend_json(backend_json("llama3+added"), 0)
    tokenizer._restore({"bos_token_id": None})
    model = tiny_model(tokenizer.vocab_size)
    pool = SessionPool(model, tokenizer, segment_length=SEGMENT_LENGTH, prefix_cache_bytes=1 << 30)
    text = f"{CORPUS[:400]}<|im_end|>"
    *cut, last = tokenizer.encode(f"{text}\U00010348").tolist()
    prompts = [(text, False), (text, True), (cut, False), ([*cut, last], False), (cut[:-1], False)]
    for prompt, parse_special in prompts + prompts:
        readers = [StreamReader(model, tokenizer, SEGMENT_LENGTH), pool.new_reader()]
        reads = []
        for reader, read in zip(readers, (read_prompt, pool.read_prompt), strict=True):
            reader.parse_special = parse_special
            reads.append(read(reader, prompt))
        cold, warm = reads
        assert warm.tokens.tolist() == cold.tokens.tolist()
        assert torch.equal(next_logits(model, warm), next_logits(model, cold))
        for reader in readers:
            assert (reader.incomplete_bytes != b"") == (prompt in (cut, cut[:-1]))
            list(reader.feed_tokens([last] if prompt == cut else []))
            list(reader.finish())
        assert readers[0].snapshot().totals == readers[1].snapshot().totals
        assert readers[0].incomplete_bytes == readers[1].incomplete_bytes
    assert warm.num_cached_tokens == len(warm.tokens)
    pool.close()


def test_a_prompt_whose_scores_are_needed_is_read(byte_model: MemoryTransformer) -> None:
    pool, prompt = new_pool(byte_model), random_text(100)
    read(pool, prompt)
    scored = pool.read_prompt(pool.new_reader(), prompt, needs_scores=True)
    assert sum(len(result.tokens) for result in scored.results) == 100
    assert scored.num_cached_tokens == 0
    pool.close()


def test_requests_at_once_and_evictions_change_no_result(byte_model: MemoryTransformer, tmp_path: Path) -> None:
    text = random_text(260)
    prompts = [text[: 40 * (index % 6)] + random_text(30 + index, index % 5) for index in range(40)]
    expected = {prompt: next_logits(byte_model, read_cold(byte_model, prompt)) for prompt in prompts}
    state_bytes = StreamReader(byte_model, ByteTokenizer()).state.nbytes
    limits = {"max_bytes": 6 * (state_bytes + 16_384), "disk_bytes": 4 * (state_bytes + 16_384)}
    pool = new_pool(byte_model, tmp_path, **limits)
    cache, sizes, is_done = pool.prefix_cache, [], threading.Event()
    assert cache is not None

    def watch() -> None:
        while not is_done.is_set():
            sizes.append((cache.num_bytes, cache.num_disk_bytes))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as threads:
        reads = list(threads.map(partial(read, pool), prompts * 3))
    is_done.set()
    watcher.join()
    for prompt, warm in zip(prompts * 3, reads, strict=True):
        assert torch.allclose(next_logits(byte_model, warm), expected[prompt], rtol=0, atol=ROUNDING)
    assert any(warm.num_cached_tokens for warm in reads)
    assert cache.counters["evictions"]
    assert max(size for size, _ in sizes) <= limits["max_bytes"]
    assert max(size for _, size in sizes) <= limits["disk_bytes"]
    pool.close()


def test_equal_prompts_at_once_are_read_once(byte_model: MemoryTransformer) -> None:
    pool, prompt = new_pool(byte_model), random_text(60 * SEGMENT_LENGTH)
    with ThreadPoolExecutor(8) as threads:
        reads = list(threads.map(partial(read, pool), [prompt] * 8))
    assert pool.engine.counters["score_tokens"] == len(prompt)
    assert sorted(warm.num_cached_tokens for warm in reads) == [0] + [len(prompt)] * 7
    pool.close()


def test_waiting_for_another_reader_ends_at_the_deadline_or_when_it_fails(byte_model: MemoryTransformer) -> None:
    pool, prompt = new_pool(byte_model), random_text(100)
    cache, reader = pool.prefix_cache, pool.new_reader()
    assert cache is not None
    prefix = cache.prefix(reader, reader.consume(prompt), "")
    with ThreadPoolExecutor(1) as threads:
        with cache.open(prefix):  # Ends without a snapshot, as after an error.
            with pytest.raises(DeadlineExceededError):
                read(pool, prompt, deadline=time.monotonic() + 0.1)
            waiting = threads.submit(read, pool, prompt)
            time.sleep(0.1)
            assert not waiting.done()
        assert waiting.result(10).num_cached_tokens == 0
    pool.close()


def current_memory() -> int:
    num_bytes = current_memory_bytes(torch.device("cpu"))
    if num_bytes is None:
        pytest.skip("the operating system does not tell the memory of a process")
    return num_bytes


def evict_all(pool: SessionPool) -> None:
    """Send every snapshot to disk."""
    cache = pool.prefix_cache
    assert cache is not None
    with cache._lock:
        while cache._snapshots:
            cache._evict()


def write_to_disk(model: MemoryTransformer, folder: Path) -> tuple[str, torch.Tensor]:
    """Leave the snapshots of a prompt of 100 tokens on disk alone; return it and the next logits of a cold read."""
    prompt = random_text(100)
    cold = next_logits(model, read_cold(model, prompt))
    pool = new_pool(model, folder)
    read(pool, prompt)
    evict_all(pool)
    pool.close()
    return prompt, cold


def test_evicted_snapshots_are_used_from_disk_also_by_a_new_process(
    byte_model: MemoryTransformer, tmp_path: Path
) -> None:
    prompt, cold = write_to_disk(byte_model, tmp_path)
    (tmp_path / "prefix-cache" / ".x.prefix.0123abcd.tmp").write_bytes(b"from a killed process")
    (tmp_path / "prefix-cache" / "note.prefix").write_bytes(b"")
    restarted = new_pool(byte_model, tmp_path)
    warm = read(restarted, prompt)
    assert warm.num_cached_tokens == 100
    assert torch.equal(next_logits(byte_model, warm), cold)
    assert not list((tmp_path / "prefix-cache").glob(".*"))
    assert restarted.prefix_cache is not None
    assert restarted.prefix_cache.num_disk_bytes > 0
    restarted.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap", "missing"])
def test_a_damaged_snapshot_is_dropped_with_a_line(
    byte_model: MemoryTransformer, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    prompt, cold = write_to_disk(byte_model, tmp_path)
    paths = sorted((tmp_path / "prefix-cache").glob("*.prefix"))
    contents = [path.read_bytes() for path in paths]
    restarted = new_pool(byte_model, tmp_path)
    for index, (path, content) in enumerate(zip(paths, contents, strict=True)):
        flipped = bytearray(content)
        flipped[-40] ^= 1
        damaged = {"flip": bytes(flipped), "truncate": content[:-1], "empty": b"", "swap": contents[index - 1]}
        path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        warm = read(restarted, prompt)
    assert warm.num_cached_tokens == 0
    assert torch.equal(next_logits(byte_model, warm), cold)
    assert len(caplog.records) == len(paths)
    assert "was removed" in caplog.text
    assert read(restarted, prompt).num_cached_tokens == 100
    restarted.close()


@pytest.mark.parametrize("num_prompts", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_prompts_stay_within_the_bound(byte_model: MemoryTransformer, num_prompts: int) -> None:
    max_bytes = num_prompts << 11
    pool, before = new_pool(byte_model, max_bytes=max_bytes), 0
    cache = pool.prefix_cache
    assert cache is not None
    for seed in range(num_prompts):
        reader = pool.new_reader()
        # The model would take minutes; the states are new tensors, as those of the model.
        reader.score_fn = lambda request: ScoreOutput(request.state.map(torch.clone), np.zeros(len(request.tokens)))
        pool.read_prompt(reader, random_text(40 + seed % 100, seed))
        assert cache.num_bytes <= max_bytes
        if seed == num_prompts // 2:
            before = current_memory()
    assert cache.counters["evictions"] > num_prompts
    assert cache.num_bytes > 0.9 * max_bytes
    assert current_memory() - before < 4 << 20
    pool.close()
