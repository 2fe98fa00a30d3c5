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
        # Every text begins with another letter, which identifies the document.
        texts = [(f"{chr(65 + number)}bc " * size)[:size] for number, size in enumerate(sizes)]
        documents = [Document(f"d{n}", f"d{n}", len(text), text=text) for n, text in enumerate(texts)]
        return open_store(documents, ByteTokenizer(), cache_dir=cache, num_workers=1)

    return store


sizes_drawn = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def read_streams(store: TokenStore, batches: Sequence[object]) -> list[list[int]]:
    """Tokens of each row over consecutive batches."""
    return torch.cat([batch.tokens for batch in batches], dim=1).tolist()  # type: ignore[attr-defined]


def split_documents(row: list[int]) -> list[tuple[int, ...]]:
    """The documents of a row, cut where a begin stands."""
    documents: list[list[int]] = []
    for token in row:
        if token == BEGIN:
            documents.append([])
        documents[-1].append(token)
    return [tuple(document) for document in documents]


@settings(deadline=None, max_examples=50)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(0, 5))
def test_a_pass_reads_every_document_once_over_all_ranks(
    make: Make, sizes: list[int], batch_size: int, world_size: int, length: int, seed: int
) -> None:
    store = make(sizes)
    passes = 3
    # By then the streams have taken all documents of three passes, and ended their last ones.
    num_tokens = passes * store.num_tokens // (batch_size * world_size) + 2 * int(store.lengths.max()) + 1
    dealt: list[tuple[int, int, str]] = []
    for rank in range(world_size):
        streams = DocumentStreams(store, batch_size, length, seed, rank, world_size)
        batches = [streams.get_batch(step) for step in range(-(-num_tokens // length))]
        for index, row in enumerate(read_streams(store, batches)):
            expected = split_documents(row)[:-1]  # the last one may continue
            offset = 0
            for tokens in expected:
                document = next(
                    index for index in range(len(store)) if tuple(store.document_tokens(index).tolist()) == tokens
                )
                dealt.append((offset, rank * batch_size + index, store.ids[document]))
                offset += len(tokens)
    dealt.sort()
    for number in range(passes):
        seen = [document for _, _, document in dealt[number * len(store) : (number + 1) * len(store)]]
        assert Counter(seen) == Counter(store.ids)


@settings(deadline=None, max_examples=50)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
def test_labels_document_starts_and_lengths_agree(
    make: Make, sizes: list[int], batch_size: int, length: int, other: int
) -> None:
    store = make(sizes)
    streams = DocumentStreams(store, batch_size, length)
    count = 6 * other
    batches = [streams.get_batch(step) for step in range(count)]
    tokens = torch.cat([batch.tokens for batch in batches], 1)
    labels = torch.cat([batch.labels for batch in batches], 1)
    document_starts = torch.cat([batch.document_starts for batch in batches], 1)
    assert torch.equal(document_starts, tokens == BEGIN)
    assert document_starts[:, 0].all()
    following = tokens[:, 1:].masked_fill(document_starts[:, 1:], IGNORE_INDEX)
    assert torch.equal(labels[:, :-1], following)
    # Another batch length reads the same streams.
    again = DocumentStreams(store, batch_size, other)
    assert read_streams(store, [again.get_batch(step) for step in range(6 * length)]) == tokens.tolist()


def test_seed_and_pass_shuffle_the_documents(make: Make) -> None:
    store = make([5] * 40)

    def read(seed: int, first: int) -> list[str]:
        streams = DocumentStreams(store, 1, 6, seed)
        tokens = [int(streams.token_indices(step)[0, 0]) for step in range(first, first + 40)]
        return [store.ids[int(np.searchsorted(store.token_offsets, token, side="right")) - 1] for token in tokens]

    assert read(0, 0) == read(0, 0)
    assert sorted(read(0, 0)) == sorted(read(0, 40)) == sorted(store.ids)
    assert len({tuple(read(0, 0)), tuple(read(0, 40)), tuple(read(1, 0)), tuple(store.ids)}) == 4


def test_iterating_ends_with_the_epoch_and_resumes_at_the_position(make: Make) -> None:
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
    assert all(torch.equal(batch.tokens, other.tokens) for batch, other in zip(rest, expected[5:9], strict=True))
    assert [batch.tokens.tolist() for batch in resumed] == [batch.tokens.tolist() for batch in expected[9:]]
    assert len(DocumentStreams(store, 50, 50)) == 1
    assert len(DocumentStreams(store, 2, 8, steps_per_epoch=4)) == 4


def test_a_position_in_other_data_is_rejected(make: Make) -> None:
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
    # Batches of another length begin where the others ended.
    odd = DocumentStreams(store, 2, 7, seed=3)
    odd.load_state_dict(saved)
    assert odd.position == 6  # a partly read batch counts as read
    assert torch.equal(odd.get_batch(6).tokens, streams.get_batch(5).tokens[:, :7])
    spread = DocumentStreams(store, 1, 8, seed=3, rank=1, world_size=2)
    spread.load_state_dict(saved)  # the same two streams, on two ranks
    assert torch.equal(spread.get_batch(5).tokens[0], streams.get_batch(5).tokens[1])


@settings(deadline=None, max_examples=60)
@given(sizes_drawn, st.integers(1, 4), st.integers(1, 3), st.integers(1, 20))
def test_evaluation_scores_every_text_token_once(
    make: Make, sizes: list[int], batch_size: int, world_size: int, length: int
) -> None:
    store = make(sizes)
    scored: list[int] = []
    words = size = 0
    documents: Counter[tuple[int, ...]] = Counter()
    lengths = set()
    for rank in range(world_size):
        streams = EvaluationStreams(store, batch_size, length, rank, world_size)
        batches = list(streams)
        lengths.add(len(batches))
        assert len(batches) == len(streams)
        for batch in batches:
            assert torch.equal(batch.document_starts, batch.tokens == BEGIN)
            scored += batch.labels[batch.labels != IGNORE_INDEX].tolist()
            words += int(batch.num_words.sum())
            size += int(batch.num_bytes.sum())
        for row in read_streams(store, batches):
            documents.update(document for document in split_documents(row) if len(document) > 1)
    assert len(lengths) == 1
    assert documents == Counter(tuple(store.document_tokens(index).tolist()) for index in range(len(store)))
    assert Counter(scored) == Counter(
        token for index in range(len(store)) for token in store.document_tokens(index)[1:]
    )
    assert (words, size) == (store.num_words.sum(), store.num_bytes.sum())


def test_a_limit_is_shared_by_the_streams(make: Make) -> None:
    store = make([80, 60, 70, 50])
    streams = EvaluationStreams(store, 2, 8, limit_tokens=40)
    batches = list(streams)
    assert len(batches) == 3
    tokens = torch.cat([batch.tokens for batch in batches], 1)
    labels = torch.cat([batch.labels for batch in batches], 1)
    assert (labels[:, :20] != IGNORE_INDEX).all()  # also the last token, whose label lies past the limit
    assert (labels[:, 20:] == IGNORE_INDEX).all()
    assert (tokens[:, 20:] == BEGIN).all()
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == 40


def test_word_counts_are_prorated_without_loss(make: Make) -> None:
    store = make([83])
    expected = np.array([int(batch.num_words.sum()) for batch in EvaluationStreams(store, 1, 7)])
    assert expected.sum() == store.num_words[0]
    # 83 bytes hold 21 words, so 7 tokens hold 1.77: one or two, never none.
    assert set(expected[:-1]) == {1, 2}


def test_numbers_out_of_range_are_rejected(make: Make) -> None:
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
    # The number of words of this split in the dataset's description.
    assert sum(int(batch.num_words.sum()) for batch in batches) == 359_979


@settings(deadline=None, max_examples=30)
@given(sizes_drawn, st.integers(1, 3), st.integers(1, 2), st.integers(1, 20), st.integers(0, 3))
def test_token_indices_match_the_store(
    make: Make, sizes: list[int], batch_size: int, world_size: int, length: int, seed: int
) -> None:
    store = make(sizes)
    expected = np.concatenate([store.document_tokens(number) for number in range(len(store))])
    for rank in range(world_size):
        streams = DocumentStreams(store, batch_size, length, seed, rank, world_size)
        for step in range(4):
            assert expected[streams.token_indices(step).numpy()].tolist() == streams.get_batch(step).tokens.tolist()
