from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.reader import StreamReader, Totals
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.transformer_xl import TransformerXL


def read(reader: StreamReader, parts: list[str | bytes]) -> np.ndarray:
    results = [result for part in parts for result in reader.feed(part)] + list(reader.finish())
    return np.concatenate([result.nll for result in results])


def test_nll_equals_that_of_the_model(pair_model: MemoryTransformer, pair_tokenizer: Tokenizer, text: str) -> None:
    reader = StreamReader(pair_model, pair_tokenizer, segment_length=7)
    nll = read(reader, [text[:600]])
    ids = torch.tensor([pair_tokenizer.bos_token_id, *pair_tokenizer.encode(text[:600]).tolist()])
    with torch.inference_mode():
        logits = pair_model(ids[None, :-1]).logits[0]
    expected = F.cross_entropy(logits, ids[1:], reduction="none").numpy()
    # float32, segments of 7 against one call: only rounding differs.
    np.testing.assert_allclose(nll, expected, atol=1e-4)
    assert reader.totals.num_tokens == len(ids) - 1
    assert reader.totals.nll == pytest.approx(float(nll.sum(dtype=np.float64)), rel=1e-12)


def test_any_recurrent_language_model_can_be_read(byte_tokenizer: Tokenizer, text: str) -> None:
    torch.manual_seed(0)
    model = TransformerXL(257, dim=8, depth=2, heads=2, memory_length=16, same_length=True).train()
    nll = read(StreamReader(model, byte_tokenizer, segment_length=9), [text[:100]])
    assert not model.training
    ids = torch.tensor([[byte_tokenizer.bos_token_id, *text[:100].encode()]])
    with torch.inference_mode():
        expected = model(ids[:, :-1], labels=ids[:, 1:]).nll[0].numpy()
    np.testing.assert_allclose(nll, expected, atol=1e-4)  # float32, other segments


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(0, 1000), max_size=8), st.booleans())
def test_results_are_bit_identical_for_any_chunks(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str, offsets: list[int], as_bytes: bool
) -> None:
    content = text[:800].encode() if as_bytes else text[:800]
    borders = sorted({offset % len(content) for offset in offsets} | {0, len(content)})
    parts = [content[start:end] for start, end in itertools.pairwise(borders)]
    nll = read(StreamReader(byte_model, byte_tokenizer, segment_length=64), parts)
    assert np.array_equal(nll, read(StreamReader(byte_model, byte_tokenizer, segment_length=64), [text[:800]]))


def test_results_cover_all_of_the_text(pair_model: MemoryTransformer, pair_tokenizer: Tokenizer, text: str) -> None:
    reader = StreamReader(pair_model, pair_tokenizer, segment_length=100)
    results = [*reader.feed(text), *reader.finish()]
    assert [result.start for result in results] == [0, *(result.end for result in results[:-1])]
    assert all(len(result.nll) == len(result.tokens) == len(result.token_bytes) for result in results)
    assert all(result.nll.dtype == np.float32 for result in results)
    assert {len(result.tokens) for result in results[:-1]} == {100}
    assert b"".join(content for result in results for content in result.token_bytes) == text.encode()
    assert (reader.totals.num_bytes, reader.totals.num_words) == (len(text.encode()), len(text.split()))


def test_the_begin_token_is_never_scored(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    reader = StreamReader(byte_model, byte_tokenizer)
    results = [*reader.feed("abc"), *reader.finish()]
    assert [result.tokens.tolist() for result in results] == [[97, 98, 99]]


def test_results_do_not_depend_on_the_segment_length(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    long = read(StreamReader(byte_model, byte_tokenizer, segment_length=5000), [text[:1500]])
    short = read(StreamReader(byte_model, byte_tokenizer, segment_length=33), [text[:1500]])
    # Only the order of float32 sums differs.
    np.testing.assert_allclose(long, short, atol=1e-4)  # float32, other segments


def test_restored_and_forked_readers_continue_exactly(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=50)
    list(reader.feed(text.encode()[:1703]))
    snapshot, fork = reader.snapshot(), reader.fork()
    continuation = text.encode()[1703:2500].decode(errors="ignore")
    nll = read(reader, [continuation])
    assert np.array_equal(read(fork, [continuation]), nll)
    reader.restore(snapshot)
    assert np.array_equal(read(reader, [continuation]), nll)
    assert reader.totals == fork.totals


def test_the_state_does_not_grow(byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=128)
    before = reader.state.nbytes
    for _ in reader.feed(text * 2):
        assert reader.state.nbytes == before
        assert not reader.state.layers[0][0].hidden.requires_grad


@pytest.mark.parametrize("parts", [["a", " b", "c ", "  ", "d"], ["", "one two"], [" x", "y\n"]])
def test_words_are_counted_across_parts(parts: list[str]) -> None:
    totals = Totals()
    for part in parts:
        totals = totals.with_text(part)
    assert totals.num_words == len("".join(parts).split())


def test_invalid_arguments_and_texts_are_reported(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, pair_tokenizer: Tokenizer
) -> None:
    with pytest.raises(MemtxError, match=r"segment_length .*0"):
        StreamReader(byte_model, byte_tokenizer, segment_length=0)
    with pytest.raises(CheckpointError, match="300 tokens"):
        StreamReader(byte_model, pair_tokenizer)
    reader = StreamReader(byte_model, byte_tokenizer)
    list(reader.feed("é".encode()[:1]))
    with pytest.raises(DataError, match="at byte offset 0"):
        list(reader.finish())


def test_token_ids_are_read_like_their_text(
    pair_model: MemoryTransformer, pair_tokenizer: Tokenizer, text: str
) -> None:
    ids = pair_tokenizer.encode(text[:400])
    from_text, from_tokens = (StreamReader(pair_model, pair_tokenizer, segment_length=20) for _ in range(2))
    expected = [*from_text.feed(text[:400]), *from_text.finish()]
    results = [*from_tokens.feed_tokens(ids[:33].tolist()), *from_tokens.feed_tokens(ids[33:]), *from_tokens.finish()]
    nll, expected_nll = (np.concatenate([result.nll for result in segments]) for segments in (results, expected))
    assert np.array_equal(nll, expected_nll)
    assert from_tokens.totals.num_bytes == from_text.totals.num_bytes
    with pytest.raises(DataError, match="Token 9999 is not in the vocabulary"):
        list(from_tokens.feed_tokens([1, 9999]))
    list(from_text.feed("a"))
    with pytest.raises(DataError, match="still pending"):
        list(from_text.feed_tokens([1]))


def test_most_likely_tokens_and_hidden_states_are_returned_on_request(
    byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=30, num_logprobs=2, return_hidden_states=True)
    plain = StreamReader(byte_model, byte_tokenizer, segment_length=30)
    list(reader.feed(text[:50]))
    results = list(reader.fork().finish())
    expected = [*plain.feed(text[:50]), *plain.finish()]
    tokens = torch.tensor([[byte_tokenizer.bos_token_id, *text[:49].encode()]])
    with torch.inference_mode():
        output = byte_model(tokens, return_hidden_states=True)
    start = 0
    for result, other in zip(results, expected, strict=True):
        assert result.hidden_states is not None
        assert result.top_tokens is not None
        assert result.top_logprobs is not None
        # float32: computed from full logits or in chunks.
        assert np.abs(result.nll - other.nll).max() < 1e-5
        segment = slice(start, start + len(result.tokens))
        hidden_states = output.hidden_states[-1][0, segment].numpy()
        assert np.abs(result.hidden_states - hidden_states).max() < 1e-4  # float32, other segments
        assert np.array_equal(result.top_tokens[:, 0], output.logits[0, segment].argmax(-1).numpy())
        assert (np.diff(result.top_logprobs) <= 0).all()
        start += len(result.tokens)
