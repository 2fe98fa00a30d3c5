from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx import files
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import CheckpointError
from memtx.inference.reader import StreamReader
from memtx.inference.sessions.file import DIGESTED_KEYS, KIND, VERSION, _digest, load_session, save_session
from memtx.models.memory_transformer import MemoryTransformer


@pytest.fixture
def saved(tmp_path: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str) -> Path:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=50)
    list(reader.feed(text.encode()[:1000] + "é".encode()[:1]))
    save_session(tmp_path / "s", reader, metadata={"name": "ü", "n": 3}, extra_tensors={"curve": torch.arange(3.0)})
    return tmp_path / "s"


def test_a_restored_session_continues_bit_for_bit(
    saved: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    uninterrupted = StreamReader(byte_model, byte_tokenizer, segment_length=50)
    list(uninterrupted.feed(text.encode()[:1000] + "é".encode()[:1]))
    resumed = StreamReader(byte_model, byte_tokenizer, segment_length=50)
    metadata, extra_tensors = load_session(saved, resumed)
    assert (metadata, extra_tensors["curve"].tolist()) == ({"name": "ü", "n": 3}, [0, 1, 2])
    assert resumed.totals == uninterrupted.totals
    for reader in (uninterrupted, resumed):
        list(reader.feed("é".encode()[1:]))
    results = [*resumed.feed(text[:700]), *resumed.finish()]
    expected = [*uninterrupted.feed(text[:700]), *uninterrupted.finish()]
    nll, expected_nll = (np.concatenate([result.nll for result in segments]) for segments in (results, expected))
    assert np.array_equal(nll, expected_nll)
    assert resumed.totals == uninterrupted.totals


def test_saving_leaves_the_reader_unchanged(
    tmp_path: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer, text: str
) -> None:
    reader = StreamReader(byte_model, byte_tokenizer, segment_length=50)
    list(reader.feed(text[:500]))
    before = reader.totals
    save_session(tmp_path / "a", reader)
    assert reader.totals == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_session_of_another_model_is_refused(
    saved: Path, byte_tokenizer: Tokenizer, byte_model: MemoryTransformer
) -> None:
    other_model = MemoryTransformer(257, dim=16, depth=1, heads=2)
    reader = StreamReader(other_model, byte_tokenizer)
    with pytest.raises(CheckpointError, match="another model"):
        load_session(saved, reader)
    assert reader.totals.num_tokens == 0


def test_a_session_of_another_tokenizer_is_refused(saved: Path, byte_model: MemoryTransformer) -> None:
    class OtherTokenizer(ByteTokenizer):
        @property
        def fingerprint(self) -> str:
            return "f" * 64

    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_session(saved, StreamReader(byte_model, OtherTokenizer()))


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(
    saved: Path, num_bytes: int, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer
) -> None:
    saved.write_bytes(saved.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match="not a valid safetensors"):
        load_session(saved, StreamReader(byte_model, byte_tokenizer))


def test_other_formats_and_versions_are_refused(
    tmp_path: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer
) -> None:
    reader = StreamReader(byte_model, byte_tokenizer)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_session(tmp_path / "none", reader)
    reader.state.save(tmp_path / "state", byte_model.fingerprint)
    with pytest.raises(CheckpointError, match=r"holds 'memtx\.state'"):
        load_session(tmp_path / "state", reader)
    files.save_tensors(tmp_path / "new", {"a": torch.zeros(1)}, kind=KIND, version=99)
    with pytest.raises(CheckpointError, match="format version 99"):
        load_session(tmp_path / "new", reader)
    header = {"model": byte_model.fingerprint, "tokenizer": byte_tokenizer.fingerprint}
    files.save_tensors(tmp_path / "bare", {"a": torch.zeros(1)}, kind=KIND, version=VERSION, **header)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        load_session(tmp_path / "bare", reader)


@settings(max_examples=60)
@given(data=st.data())
def test_a_file_with_one_flipped_bit_is_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory, byte_model: MemoryTransformer
) -> None:
    reader = StreamReader(byte_model, ByteTokenizer(), segment_length=50)
    path = tmp_path_factory.mktemp("flipped") / "s"
    list(reader.feed("It was a dark and stormy night. " * 5))
    save_session(path, reader)
    content = bytearray(path.read_bytes())
    # Half of the flips are in the header, a small part of the file.
    offset = data.draw(st.one_of(st.integers(0, 2000), st.integers(0, len(content) - 1)))
    content[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_session(path, StreamReader(byte_model, ByteTokenizer(), segment_length=50))


FORGED = {
    "another batch size": lambda tensors, header: tensors.update({"state.position": torch.zeros(2, dtype=torch.int64)}),
    "huge position": lambda tensors, header: tensors.update({"state.position": torch.full((1,), 2**62)}),
    "negative position": lambda tensors, header: tensors.update({"state.position": torch.full((1,), -5)}),
    "state with NaN": lambda tensors, header: tensors["state.layers[0][0].hidden"].fill_(torch.nan),
    "unknown tokens": lambda tensors, header: tensors.update({"pending_tokens": torch.full((3,), 999)}),
    "floating tokens": lambda tensors, header: tensors.update({"pending_tokens": torch.zeros(3)}),
    "complete chunk": lambda tensors, header: tensors.update({"pending_text": torch.full((9000,), 65).byte()}),
    "invalid text": lambda tensors, header: tensors.update({"pending_text": torch.full((3,), 255).byte()}),
    "long character": lambda tensors, header: tensors.update({"pending_bytes": torch.full((9,), 226).byte()}),
    "no pending tokens": lambda tensors, header: tensors.pop("pending_tokens"),
    "negative last token": lambda tensors, header: header.update(last_token="-1"),
    "text as last token": lambda tensors, header: header.update(last_token="x"),
    "text in totals": lambda tensors, header: header.update(totals='{"nll": "much"}'),
    "infinite totals": lambda tensors, header: header.update(totals='{"nll": Infinity}'),
    "list as metadata": lambda tensors, header: header.update(metadata="[1]"),
    "deeply nested metadata": lambda tensors, header: header.update(metadata="[" * 100_000),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_session_is_refused(forgery: str, saved: Path, byte_model: MemoryTransformer) -> None:
    # A forged file can have a valid digest, so its content must be checked too.
    tensors, header = files.load_tensors(saved, kind=KIND, version=VERSION)
    header = {name: header[name] for name in DIGESTED_KEYS if name in header}
    reader = StreamReader(byte_model, ByteTokenizer(), segment_length=50)
    FORGED[forgery](tensors, header)
    header["digest"] = _digest(tensors, header)
    files.save_tensors(saved, tensors, kind=KIND, version=VERSION, **header)
    with pytest.raises(CheckpointError):
        load_session(saved, reader)
    assert reader.totals.num_tokens == 0
