"""A run resumed with other streams on other ranks: every token is still read once a pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.batch import IGNORE_INDEX
from memtx.data.shards import TokenStore
from memtx.data.streams import DocumentStreams


def numbered(lengths: Sequence[int]) -> TokenStore:
    """A store in which every token of every document is a number of its own, ascending within a document."""
    begins = np.concatenate([[0], np.cumsum(lengths)])
    sizes = np.asarray(lengths, dtype=np.int64)

    def text(document: int, first: int, past: int) -> Any:
        return np.arange(begins[document] + first, begins[document] + min(past, lengths[document]))

    store = SimpleNamespace(
        lengths=sizes,
        num_tokens=int(sizes.sum()),
        num_words=sizes,
        num_bytes=sizes * 3,
        ids=[f"d{index}" for index in range(len(lengths))],
        bos_token_id=-1,
        fingerprint="numbered",
        slice_tokens=text,
    )
    return cast(TokenStore, store)


def resumed(store: TokenStore, batch_size: int, ranks: int, length: int, state: dict[str, Any] | None) -> list[Any]:
    streams = [DocumentStreams(store, batch_size, length, 3, rank, ranks) for rank in range(ranks)]
    for stream in streams if state is not None else ():
        stream.load_state_dict(state)
    return streams


stages = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 8)), max_size=4)


@settings(max_examples=150)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), stages)
def test_every_token_is_read_once_a_pass(lengths: list[int], stages: list[tuple[int, int, int, int]]) -> None:
    store = numbered(lengths)
    read = np.zeros(store.num_tokens, dtype=np.int64)
    labels, size = 0, 0
    state: dict[str, Any] | None = None
    for batch_size, ranks, length, batches in stages:
        streams = resumed(store, batch_size, ranks, length, state)
        for _ in range(batches):
            for rank_streams in streams:
                batch = next(iter(rank_streams))
                np.add.at(read, batch.tokens.flatten().numpy(), 1)
                labels += int((batch.labels != IGNORE_INDEX).sum())
                size += int(batch.num_bytes.sum())
                # The label is the next token of the same document.
                scored = batch.labels != IGNORE_INDEX
                assert torch.equal(batch.labels[scored], batch.tokens[scored] + 1)
        state = streams[0].state_dict()
        assert all(rank_streams.state_dict() == state for rank_streams in streams)
    # A single stream reads what others left of their passes, then one pass after another.
    (last,) = resumed(store, 1, 1, 1, state)
    ended = []
    for step in range(store.num_tokens * (3 + 12) + 12 * 30):
        batch = last.get_batch(last.position + step)
        read[batch.tokens.item()] += 1
        labels += int((batch.labels != IGNORE_INDEX).sum())
        size += int(batch.num_bytes.sum())
        if (read == read[0]).all():
            ended.append(step)
            # Every token but a document's first is a label once a pass, and raw text is counted to the byte.
            assert labels == read[0] * (store.num_tokens - len(lengths))
            assert size == read[0] * sum(
                int(num_bytes) for num_bytes, tokens in zip(store.num_bytes, lengths, strict=True) if tokens > 1
            )
            if len(ended) == 2:
                break
    assert len(ended) == 2
    assert ended[1] - ended[0] == store.num_tokens


@settings(max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=9), st.integers(1, 6), st.integers(1, 6), st.integers(1, 12))
def test_streams_that_remain_continue(lengths: list[int], before: int, after: int, batches: int) -> None:
    store = numbered(lengths)
    (first,) = resumed(store, before, 1, 4, None)
    *_, seen = [first.get_batch(step) for step in range(batches)]
    first.position = batches
    (then,) = resumed(store, after, 1, 4, first.state_dict())
    went, undisturbed = then.get_batch(then.position), first.get_batch(batches)
    for row in range(after):
        if row >= before:
            assert went.document_starts[row, 0]
        elif not went.document_starts[row, 0]:
            assert went.tokens[row, 0] == seen.tokens[row, -1] + 1
            assert torch.equal(went.tokens[row, 0], undisturbed.tokens[row, 0])
    if before == after:
        assert all(torch.equal(tensor, other) for tensor, other in zip(went, undisturbed, strict=True))
        assert then.resume_message == ""
    else:
        assert f"The checkpoint has {before} streams, this run {after}" in then.resume_message


@pytest.mark.parametrize(("batch_size", "ranks"), [(4, 1), (2, 2), (1, 4)])
def test_the_number_of_ranks_does_not_matter(batch_size: int, ranks: int) -> None:
    store = numbered([20, 30, 7, 12, 40])
    (uninterrupted,) = resumed(store, 2, 1, 5, None)
    uninterrupted.position = 7
    state = uninterrupted.state_dict()
    (single,) = resumed(store, 4, 1, 5, state)
    parts = resumed(store, batch_size, ranks, 5, state)
    for step in range(single.position, single.position + 20):
        assert torch.equal(torch.cat([part.get_batch(step).tokens for part in parts]), single.get_batch(step).tokens)


def test_the_rest_of_an_epoch_is_counted_in_the_new_batches() -> None:
    store = numbered([100] * 6)  # 600 tokens
    (first,) = resumed(store, 2, 1, 10, None)
    assert len(first) == 30
    for done, batch_size, stride, expected, left in (
        (12, 4, 1, 6, 9),
        (13, 4, 1, 7, 8),
        (13, 4, 4, 8, 7),
        (29, 4, 4, 14, 1),  # an unfinished epoch has a batch left
        (30, 4, 4, 15, 15),  # the next epoch begins
        (30, 1, 1, 60, 60),
        (31, 1, 1, 62, 58),
    ):
        first.position = done
        then = DocumentStreams(store, batch_size, 10, 3)
        then.load_state_dict(first.state_dict(), stride)
        assert then.position == expected
        assert len(list(then)) == left
