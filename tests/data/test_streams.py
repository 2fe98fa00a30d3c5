from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.batch import IGNORE_INDEX
from memtx.data.shards import TokenStore
from memtx.data.sources.base import Document
from memtx.data.streams import DocumentStreams, EvaluationStreams
from memtx.data.tokenized_corpus import open_store
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import CheckpointError, DataError

BEGIN = ByteTokenizer().bos_token_id
Make = Callable[[Sequence[int]], TokenStore]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    cache = tmp_path_factory.mktemp("cache")

    def store(sizes: Sequence[int]) -> TokenStore:
        # Every text begins with a letter of its own, so that what was read says which document it was.
        texts = [(f"{chr(65 + number)}bc " * size)[:size] for number, size in enumerate(sizes)]
        documents = [Document(f"d{n}", f"d{n}", len(text), text=text) for n, text in enumerate(texts)]
        return open_store(documents, ByteTokenizer(), cache_dir=cache, num_workers=1)

    return store


sizes_drawn = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def rows_read(store: TokenStore, batches: Sequence[object]) -> list[list[int]]:
    """Tokens of each row over consecutive batches."""
    return torch.cat([batch.tokens for batch in batches], dim=1).tolist()  # type: ignore[attr-defined]


def split_documents(row: list[int]) -> list[tuple[int, ...]]:
    """The documents of a row, cut where a begin stands."""
    found: list[list[int]] = []
    for token in row:
        if token == BEGIN:
            found.append([])
        found[-1].append(token)
    return [tuple(one) for one in found]


@settings(deadline=None, max_examples=50)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 5))
def test_a_pass_reads_every_document_once_over_all_ranks(
    make: Make, sizes: list[int], rows: int, world_size: int, length: int, seed: int
) -> None:
    store = make(sizes)
    passes = 3
    # By then the rows have taken in all of three passes, and ended what they took last.
    ticks = passes * store.num_tokens // (rows * world_size) + 2 * int(store.lengths.max()) + 1
    dealt: list[tuple[int, int, str]] = []
    for rank in range(world_size):
        streams = DocumentStreams(store, rows, length, seed, rank, world_size)
        batches = [streams.get_batch(step) for step in range(-(-ticks // length))]
        for index, row in enumerate(rows_read(store, batches)):
            whole = split_documents(row)[:-1]  # the last one may go on
            tick = 0
            for one in whole:
                document = next(
                    place for place in range(len(store)) if tuple(store.document_tokens(place).tolist()) == one
                )
                dealt.append((tick, rank * rows + index, store.ids[document]))
                tick += len(one)
    dealt.sort()
    for number in range(passes):
        seen = [document for _, _, document in dealt[number * len(store) : (number + 1) * len(store)]]
        assert Counter(seen) == Counter(store.ids)


@settings(deadline=None, max_examples=50)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
def test_labels_starts_and_lengths_agree(make: Make, sizes: list[int], rows: int, length: int, other: int) -> None:
    store = make(sizes)
    streams = DocumentStreams(store, rows, length)
    count = 6 * other
    batches = [streams.get_batch(step) for step in range(count)]
    tokens = torch.cat([batch.tokens for batch in batches], 1)
    labels = torch.cat([batch.labels for batch in batches], 1)
    starts = torch.cat([batch.document_starts for batch in batches], 1)
    assert torch.equal(starts, tokens == BEGIN)
    assert starts[:, 0].all()
    following = tokens[:, 1:].masked_fill(starts[:, 1:], IGNORE_INDEX)
    assert torch.equal(labels[:, :-1], following)
    # Another batch length reads the same rows.
    again = DocumentStreams(store, rows, other)
    assert rows_read(store, [again.get_batch(step) for step in range(6 * length)]) == tokens.tolist()


def test_the_seed_and_the_pass_shuffle(make: Make) -> None:
    store = make([5] * 40)

    def read(seed: int, first: int) -> list[str]:
        streams = DocumentStreams(store, 1, 6, seed)
        tokens = [int(streams.token_indices(step)[0, 0]) for step in range(first, first + 40)]
        return [store.ids[int(np.searchsorted(store.token_offsets, token, side="right")) - 1] for token in tokens]

    assert read(0, 0) == read(0, 0)
    assert sorted(read(0, 0)) == sorted(read(0, 40)) == sorted(store.ids)
    assert len({tuple(read(0, 0)), tuple(read(0, 40)), tuple(read(1, 0)), tuple(store.ids)}) == 4


def test_iterating_ends_at_the_epoch_and_goes_on_from_the_position(make: Make) -> None:
    store = make([50, 30, 70])
    streams = DocumentStreams(store, 2, 8, seed=3)
    assert len(streams) == store.num_tokens // 16 == 9
    expected = [streams.get_batch(step) for step in range(18)]
    iterator = iter(streams)
    for step in range(5):
        assert torch.equal(next(iterator).tokens, expected[step].tokens)
        assert streams.position == step + 1
    resumed = DocumentStreams(store, 2, 8, seed=3)
    resumed.load_state_dict(streams.state_dict())
    rest = list(resumed)
    assert len(rest) == 4
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(rest, expected[5:9], strict=True))
    assert [one.tokens.tolist() for one in resumed] == [one.tokens.tolist() for one in expected[9:]]
    assert len(DocumentStreams(store, 50, 50)) == 1
    assert len(DocumentStreams(store, 2, 8, steps_per_epoch=4)) == 4


def test_a_position_in_other_data_is_refused(make: Make) -> None:
    store, other = make([50, 30, 70]), make([50, 30, 71])
    streams = DocumentStreams(store, 2, 8, seed=3)
    streams.position = 5
    saved = streams.state_dict()
    for another, word in (
        (DocumentStreams(other, 2, 8, seed=3), "corpus"),
        (DocumentStreams(store, 2, 8, seed=4), "seed 3, this run has 4"),
    ):
        with pytest.raises(CheckpointError, match=word):
            another.load_state_dict(saved)
    shorter = DocumentStreams(store, 2, 4, seed=3)
    shorter.load_state_dict(saved)
    assert shorter.position == 10
    # Its batches begin where the others ended, whatever the length.
    odd = DocumentStreams(store, 2, 7, seed=3)
    odd.load_state_dict(saved)
    assert odd.position == 6  # a batch that was read in part counts as read
    assert torch.equal(odd.get_batch(6).tokens, streams.get_batch(5).tokens[:, :7])
    spread = DocumentStreams(store, 1, 8, seed=3, rank=1, world_size=2)
    spread.load_state_dict(saved)  # the same two rows, on two ranks
    assert torch.equal(spread.get_batch(5).tokens[0], streams.get_batch(5).tokens[1])


@settings(deadline=None, max_examples=60)
@given(sizes_drawn, st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_evaluation_scores_every_text_token_once(
    make: Make, sizes: list[int], rows: int, world_size: int, length: int
) -> None:
    store = make(sizes)
    scored: list[int] = []
    words = size = 0
    found: Counter[tuple[int, ...]] = Counter()
    lengths = set()
    for rank in range(world_size):
        streams = EvaluationStreams(store, rows, length, rank, world_size)
        batches = list(streams)
        lengths.add(len(batches))
        assert len(batches) == len(streams)
        for batch in batches:
            assert torch.equal(batch.document_starts, batch.tokens == BEGIN)
            scored += batch.labels[batch.labels != IGNORE_INDEX].tolist()
            words += int(batch.num_words.sum())
            size += int(batch.num_bytes.sum())
        for row in rows_read(store, batches):
            found.update(one for one in split_documents(row) if len(one) > 1)
    assert len(lengths) == 1
    assert found == Counter(tuple(store.document_tokens(place).tolist()) for place in range(len(store)))
    assert Counter(scored) == Counter(
        token for place in range(len(store)) for token in store.document_tokens(place)[1:]
    )
    assert (words, size) == (store.num_words.sum(), store.num_bytes.sum())


def test_a_limit_is_shared_by_the_rows(make: Make) -> None:
    store = make([80, 60, 70, 50])
    streams = EvaluationStreams(store, 2, 8, limit_tokens=40)
    batches = list(streams)
    assert len(batches) == 3
    tokens = torch.cat([batch.tokens for batch in batches], 1)
    labels = torch.cat([batch.labels for batch in batches], 1)
    assert (labels[:, :20] != IGNORE_INDEX).all()  # also the last one, whose next token lies past the limit
    assert (labels[:, 20:] == IGNORE_INDEX).all()
    assert (tokens[:, 20:] == BEGIN).all()
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == 40


def test_words_are_apportioned_without_loss(make: Make) -> None:
    store = make([83])
    whole = np.array([int(batch.num_words.sum()) for batch in EvaluationStreams(store, 1, 7)])
    assert whole.sum() == store.num_words[0]
    # 83 bytes hold 21 words, so 7 tokens hold 1.77: one or two, never none.
    assert set(whole[:-1]) == {1, 2}


def test_impossible_numbers_are_named(make: Make) -> None:
    store = make([5])
    with pytest.raises(DataError, match="batch_size is 0"):
        DocumentStreams(store, 0, 8)
    with pytest.raises(DataError, match="rank is 2"):
        EvaluationStreams(store, 1, 8, rank=2, world_size=2)
    with pytest.raises(DataError, match="limit_tokens is 0"):
        EvaluationStreams(store, 1, 8, limit_tokens=0)


def test_books(books: Path, tmp_path: Path) -> None:
    from memtx.data.sources.corpus import open_corpus

    corpus = open_corpus(books)
    assert len(corpus.get_split("train")) == 39
    assert corpus.get_split("train")[0].title != corpus.get_split("train")[0].id
    store = open_store(corpus.get_split("validation"), ByteTokenizer(), cache_dir=tmp_path, num_workers=2)
    batches = EvaluationStreams(store, 4, 65_536)
    # The number of words that the data's own description gives for this split.
    assert sum(int(batch.num_words.sum()) for batch in batches) == 359_979


@settings(deadline=None, max_examples=30)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 2), st.integers(1, 20), st.integers(0, 3))
def test_places_are_where_the_tokens_stand_in_the_store(
    make: Make, sizes: list[int], rows: int, world_size: int, length: int, seed: int
) -> None:
    store = make(sizes)
    whole = np.concatenate([store.document_tokens(number) for number in range(len(store))])
    for rank in range(world_size):
        streams = DocumentStreams(store, rows, length, seed, rank, world_size)
        for step in range(4):
            assert whole[streams.token_indices(step).numpy()].tolist() == streams.get_batch(step).tokens.tolist()
