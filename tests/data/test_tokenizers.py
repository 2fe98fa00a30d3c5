from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.data.text_chunks import split_text
from memtx.data.tokenizers import BytePairTokenizer, ByteTokenizer, Tokenizer, load_tokenizer, tokenizer_from_json
from memtx.errors import DataError

TEXTS = [
    f"The {word} of the memory is a {word}, and the {word} remembers.\n\n" * 40 for word in ["whale", "ship", "sea"]
]


def trained(size: int = 300) -> BytePairTokenizer:
    tokenizer = BytePairTokenizer(size)
    tokenizer.train(TEXTS)
    return tokenizer


KINDS: dict[str, Tokenizer] = {"byte": ByteTokenizer(), "bpe": trained()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(), size=st.integers(1, 9))
def test_round_trip_however_the_text_arrives(kind: str, text: str, size: int) -> None:
    tokenizer = KINDS[kind]
    text = text + "<|begin|>\r\n" + text * 200
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(int(token)) for token in ids) == text.encode()
    assert tokenizer.bos_token_id not in ids
    assert not len(ids) or int(ids.max()) < tokenizer.vocab_size
    portions = [text[i : i + size * 100] for i in range(0, len(text), size * 100)]
    assert np.array_equal(np.concatenate(list(tokenizer.encode_stream(portions))), ids)
    assert np.array_equal(np.concatenate([tokenizer.encode_chunk(piece) for piece in split_text(text)]), ids)


def test_json_and_file_keep_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    text = TEXTS[0] + "<|begin|> éß"
    copies = [tokenizer_from_json(tokenizer.to_json()), load_tokenizer(tmp_path / "tokenizer.json")]
    for copy in [*copies, pickle.loads(pickle.dumps(tokenizer))]:
        assert copy.fingerprint == tokenizer.fingerprint
        assert (copy.vocab_size, copy.bos_token_id) == (tokenizer.vocab_size, tokenizer.bos_token_id)
        assert np.array_equal(copy.encode(text), tokenizer.encode(text))


def test_the_begin_token_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.bos_token_id) == b""
    assert tokenizer.decode([tokenizer.bos_token_id, *tokenizer.encode("ab").tolist()]) == "ab"
    assert len(tokenizer.encode("")) == 0


def test_training_is_deterministic_and_the_size_is_known_before() -> None:
    assert BytePairTokenizer(5000).vocab_size == 5000
    first, second = trained(5000), trained(5000)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 5000  # although these texts cannot yield as many
    assert len(first.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 3
    assert first.token_bytes(4999) == b""


def test_half_a_character_decodes_to_the_replacement() -> None:
    assert ByteTokenizer().decode("aé".encode()[:2]) == "a\ufffd"


def test_a_tokenizer_file_keeps_its_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    text = "the whale remembers 日本"
    assert ours.encode(text).tolist() == backend.encode(text).ids
    assert (ours.bos_token_id, ours.vocab_size) == (None, backend.get_vocab_size())  # No begin token is invented.
    assert ours.decode(ours.encode(text)) == text
    again = tokenizer_from_json(ours.to_json())
    assert (again.bos_token_id, again.fingerprint) == (ours.bos_token_id, ours.fingerprint)


def test_mistakes_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"U\+D800"):
        tokenizer.encode("a\ud800")
    with pytest.raises(DataError, match=f"Token {tokenizer.vocab_size} "):
        tokenizer.token_bytes(tokenizer.vocab_size)
    with pytest.raises(DataError, match="vocab_size is 10"):
        BytePairTokenizer(10)
    with pytest.raises(DataError, match="not trained yet"):
        BytePairTokenizer(300).encode("a")
    with pytest.raises(DataError, match=r"none\.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    value = json.loads(ByteTokenizer().to_json())
    with pytest.raises(DataError, match="version 9"):
        tokenizer_from_json(json.dumps({**value, "version": 9}))
