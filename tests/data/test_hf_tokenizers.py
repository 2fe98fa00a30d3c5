from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtx.data.hf_tokenizers import HFTokenizer, WordPieceTokenizer, hf_tokenizer_from_json
from memtx.errors import DataError
from tests.tasks import texts, tokenizer

OWN = tokenizer()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_offsets_are_ordered_positions_in_the_text(text: str) -> None:
    (encoding,) = OWN.encode_with_offsets([text])
    assert len(encoding.ids) == len(encoding.offsets)
    assert all(0 <= start <= stop <= len(text) for start, stop in encoding.offsets)
    start_offsets = encoding.offsets[:, 0].tolist()
    assert start_offsets == sorted(start_offsets)
    assert all(0 <= token < OWN.vocab_size for token in encoding.ids)


def test_offsets_spell_the_tokens() -> None:
    text = "the white  whale saw Ahab ."
    (encoding,) = OWN.encode_with_offsets([text])
    spelled = [text[start:stop] for start, stop in encoding.offsets]
    assert "".join(spelled) == text.replace(" ", "")


def test_special_tokens_in_a_text_are_plain_text() -> None:
    (encoding,) = OWN.encode_with_offsets(["[CLS] whale [SEP] [MASK]"])
    assert not set(encoding.ids.tolist()) & {OWN.cls_token_id, OWN.sep_token_id, OWN.mask_token_id, OWN.pad_token_id}
    assert len({OWN.cls_token_id, OWN.sep_token_id, OWN.mask_token_id, OWN.pad_token_id, OWN.unk_token_id}) == 5


def test_a_saved_tokenizer_gives_the_same_ids() -> None:
    text = texts(1, seed=9)[0]
    for other in (hf_tokenizer_from_json(OWN.to_json()), pickle.loads(pickle.dumps(OWN)), tokenizer()):
        assert other.fingerprint == OWN.fingerprint
        assert other.encode_with_offsets([text])[0].ids.tolist() == OWN.encode_with_offsets([text])[0].ids.tolist()
        assert (other.cls_token_id, other.mask_token_id, other.vocab_size) == (
            OWN.cls_token_id,
            OWN.mask_token_id,
            OWN.vocab_size,
        )


def test_the_tokenizer_of_a_run_is_read_for_a_task(tmp_path: Path) -> None:
    OWN.save(tmp_path / "tokenizer.json")
    text = texts(1, seed=9)[0]
    other = HFTokenizer(str(tmp_path))
    assert other.encode_with_offsets([text])[0].ids.tolist() == OWN.encode_with_offsets([text])[0].ids.tolist()
    assert other.mask_token_id == OWN.mask_token_id


def test_a_library_file_keeps_its_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.train_from_iterator(texts(30), trainer=trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer_from_file = HFTokenizer(str(tmp_path / "tokenizer.json"))
    assert (
        tokenizer_from_file.cls_token_id,
        tokenizer_from_file.pad_token_id,
        tokenizer_from_file.sep_token_id,
        tokenizer_from_file.unk_token_id,
        tokenizer_from_file.mask_token_id,
    ) == (0, 1, 2, 3, 4)
    text = "the white whale saw Ahab ."
    (encoding,) = tokenizer_from_file.encode_with_offsets([text])
    # Neither truncated nor padded, and no token begins with the space before its word.
    assert "".join(text[start:stop] for start, stop in encoding.offsets) == text.replace(" ", "")


def test_mistakes_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        HFTokenizer(str(tmp_path / "no.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        HFTokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match="not trained yet"):
        WordPieceTokenizer(300).encode_with_offsets(["a"])
    with pytest.raises(DataError, match="at least 100"):
        WordPieceTokenizer(10)
    with pytest.raises(DataError, match="half of a surrogate"):
        OWN.encode_with_offsets(["\ud800"])
    for text in ("", "[]", json.dumps({"format": "x", "version": 1, "vocab_size": 1, "model": {}})):
        with pytest.raises(DataError):
            hf_tokenizer_from_json(text)
