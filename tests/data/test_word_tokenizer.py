"""Words as tokens: the vocabulary and ids of Transformer-XL's original code, however texts arrive."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import MemtxError
from memtx.data.base_tokenizer import concatenate
from memtx.data.tokenizers import ByteTokenizer, Tokenizer, WordTokenizer, load_tokenizer, tokenizer_from_json
from memtx.inference.incremental_tokenizer import IncrementalTokenizer

WORDS = st.sampled_from(["the", "The", "a", "<unk>", "<eos>", "naïve", "x.", "\u6211\u4eec", "-"])
SPACES = st.sampled_from([" ", "\n", "\r\n", "\r", " \n ", "\t", "  ", "\u2028", "\x85", ""])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=30).map(lambda parts: "".join(word + gap for word, gap in parts))


def lines(text: str) -> list[str]:
    """Return the complete lines of a text and its last words, as a file opened in text mode has them."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def original_vocabulary(texts: list[str], min_freq: int, lower_case: bool) -> list[str]:
    """Count as the original does: <eos> first, then all words by count, equal ones by their first occurrence."""
    counts: Counter[str] = Counter()
    for text in texts:
        for line in lines(text):
            counts.update((line.lower() if lower_case else line).split())
    words = [word for word, count in counts.most_common() if count >= min_freq and word != "<eos>"]
    return ["<eos>", *words, *([] if "<unk>" in words else ["<unk>"])]


def original_ids(vocabulary: list[str], text: str, lower_case: bool) -> list[int]:
    ids: list[int] = []
    *complete, last = lines(text.lower() if lower_case else text)
    for words, end in [*((line.split(), [0]) for line in complete), (last.split(), [])]:
        known = [word if word in vocabulary and word != "<eos>" else "<unk>" for word in words]
        ids += [vocabulary.index(word) for word in known] + end
    return ids


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    size=st.integers(1, 9),
    min_freq=st.integers(1, 3),
    lower=st.booleans(),
)
def test_vocabulary_and_ids_are_those_of_the_original(texts: list[str], size: int, min_freq: int, lower: bool) -> None:
    tokenizer = WordTokenizer(min_freq=min_freq, lower_case=lower)
    tokenizer.train_documents([text[at : at + size] for at in range(0, len(text), size)] for text in texts)
    vocabulary = original_vocabulary(texts, min_freq, lower)
    assert tokenizer.vocab_size == len(vocabulary)
    assert [tokenizer.token_bytes(token).decode().strip(" ") for token in range(1, len(vocabulary))] == vocabulary[1:]
    unseen = texts[0] + " unseen words\nand more"
    assert tokenizer.encode(unseen).tolist() == original_ids(vocabulary, unseen, lower)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS, sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_ids_do_not_depend_on_the_portions_and_stand_for_the_text(text: str, sizes: list[int]) -> None:
    tokenizer = trained()
    encoder, chunks, start = tokenizer.encoder(), [], 0
    for size in [*sizes, len(text)]:
        chunks += encoder.feed(text[start : start + size])
        start += size
    chunks += encoder.flush()
    assert concatenate([chunk.ids for chunk in chunks]).tolist() == tokenizer.encode(text).tolist()
    for chunk in chunks:
        assert b"".join(tokenizer.align(chunk)).decode() == chunk.chunk.text
        assert len(tokenizer.align(chunk)) == len(chunk.ids)
    reader = IncrementalTokenizer(tokenizer)
    contents = [content for _, tokens in reader.feed(text) for content in tokens.contents] + [*reader.finish().contents]
    # Only white space at the end of a text has no token to belong to.
    assert text.encode().startswith(joined := b"".join(contents))
    assert not text.encode()[len(joined) :].decode().strip()


def trained(**options: object) -> WordTokenizer:
    tokenizer = WordTokenizer(**options)  # type: ignore[arg-type]
    tokenizer.train(["the cat sat on the mat . \n the end\n", "a naïve \u6211\u4eec"])
    return tokenizer


def test_decoding_writes_lines_of_words_with_single_spaces() -> None:
    tokenizer = trained()
    ids = tokenizer.encode("  the  cat sat\n\n the unseen end ")
    assert tokenizer.decode(ids) == "the cat sat\n\nthe <unk> end"
    contents = tokenizer.token_contents(ids.tolist(), continues=False)
    assert b"".join(contents).decode() == tokenizer.decode(ids)
    assert tokenizer.decoder(continues=True).feed(int(ids[0])) == " the"
    assert tokenizer.word_ids(ids.tolist()).tolist() == list(range(len(ids)))


def test_json_and_pickle_keep_everything(tmp_path: Path) -> None:
    for tokenizer in (trained(), trained(vocab_size=40, min_freq=2, lower_case=True), trained(eos_token=None)):
        tokenizer.save(tmp_path / "tokenizer.json")
        copies = (
            tokenizer_from_json(tokenizer.to_json()),
            load_tokenizer(tmp_path),
            pickle.loads(pickle.dumps(tokenizer)),
        )
        for copy in copies:
            assert copy.fingerprint == tokenizer.fingerprint
            assert copy.vocab_size == tokenizer.vocab_size
            assert copy.encode("The cat\n the unseen").tolist() == tokenizer.encode("The cat\n the unseen").tolist()
    assert trained(vocab_size=40).vocab_size == 40
    assert trained(vocab_size=40).token_bytes(39) == b""


def test_a_limited_vocabulary_keeps_the_most_frequent_words() -> None:
    tokenizer = trained(vocab_size=4)
    assert tokenizer.encode("the cat sat\n").tolist() == [1, 2, 3, 0]
    assert tokenizer.decode([1, 2, 3]) == "the cat <unk>"


def test_special_spellings_are_words_unless_they_are_parsed() -> None:
    tokenizer = trained()
    assert tokenizer.encode("the <eos>").tolist() == [1, tokenizer.unk_id]
    assert tokenizer.encode("the <eos>", parse_special=True).tolist() == [1, 0]


def test_vocabulary_files_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("<S> 900\nthe 50\n<UNK> 3\ncat\n\n")
    tokenizer = WordTokenizer(path=str(path))
    assert tokenizer.is_trained
    assert tokenizer.vocab_size == 5  # with the line end, which the file lacks
    assert tokenizer.encode("the cat barked\n").tolist() == [1, 3, 2, 4]
    assert WordTokenizer(path=str(path), eos_token="<S>").encode("the\n").tolist() == [1, 0]
    assert WordTokenizer(path=str(path), eos_token=None).encode("the\ncat").tolist() == [1, 3]


@pytest.mark.parametrize(
    ("content", "words"), [("", "no words"), ("the\nthe\n", "'the' twice"), ("the\n", "'cat' is not in the vocabulary")]
)
def test_mistakes_are_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text(content)
    with pytest.raises(MemtxError, match=words):
        WordTokenizer(path=str(path), eos_token=None).encode("the cat")


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    for options in ({"vocab_size": 1}, {"min_freq": 0}, {"eos_token": "two words"}, {"path": str(tmp_path / "none")}):
        with pytest.raises(MemtxError):
            WordTokenizer(**options)  # type: ignore[arg-type]
    with pytest.raises(MemtxError, match="not known before training"):
        _ = WordTokenizer().vocab_size
    with pytest.raises(MemtxError, match="not trained"):
        WordTokenizer(vocab_size=9).encode("a")
    damaged = trained().to_json().replace('"words": [', '"words": [3, ')
    with pytest.raises(MemtxError, match="damaged"):
        tokenizer_from_json(damaged)


def test_a_text_without_white_space_needs_little_memory() -> None:
    tokenizer: Tokenizer = trained()
    encoder, num_tokens = tokenizer.encoder(), 0
    for _ in range(20):
        num_tokens += sum(len(chunk.ids) for chunk in encoder.feed("x" * 5000))
        assert len(encoder.pending) < 8192
    assert num_tokens == 12
    assert np.dtype(tokenizer.encode("the").dtype).kind == "i"
    assert ByteTokenizer().knows_vocab_size
