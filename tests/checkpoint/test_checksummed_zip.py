"""Zip files with a checksum: readable by any zip reader, and every changed byte is detected."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.checkpoint import checksummed_zip
from memtx.errors import CheckpointError, MemtxError

CONTENT = {"weights": torch.arange(50.0), "step": 3, "text": "störmy"}


def write(path: Path, step: int = 3) -> bytes:
    with checksummed_zip.create(path, step) as handle:
        torch.save(CONTENT, handle)  # type: ignore[arg-type]
    return path.read_bytes()


@pytest.fixture(scope="module")
def intact_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checksummed") / "a.ckpt"
    write(path)
    return path


def test_any_zip_reader_opens_the_file(intact_file: Path) -> None:
    checksummed_zip.verify(intact_file)
    assert checksummed_zip.read_step(intact_file) == 3
    for mapped in (False, True):
        loaded = torch.load(intact_file, weights_only=True, mmap=mapped)
        assert torch.equal(loaded["weights"], CONTENT["weights"])
        assert loaded["text"] == CONTENT["text"]
    with zipfile.ZipFile(intact_file) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"memtx step=")


@given(offset=st.integers(0), bit=st.integers(0, 7))
def test_every_flipped_bit_is_detected(intact_file: Path, offset: int, bit: int) -> None:
    content = bytearray(intact_file.read_bytes())
    content[offset % len(content)] ^= 1 << bit
    other = intact_file.with_name("flipped")
    other.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        checksummed_zip.verify(other)


@given(size=st.integers(0), more=st.binary(max_size=300))
def test_any_other_length_is_refused(intact_file: Path, size: int, more: bytes) -> None:
    content = intact_file.read_bytes()
    other = intact_file.with_name("cut")
    changed = content[: size % len(content)] + more
    if changed == content:
        return
    other.write_bytes(changed)
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        checksummed_zip.verify(other)


@given(content=st.binary(max_size=400))
def test_arbitrary_bytes_are_no_checkpoint(intact_file: Path, content: bytes) -> None:
    other = intact_file.with_name("junk")
    other.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        checksummed_zip.verify(other)


def test_file_without_comment_uses_zip_checksums(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(CONTENT, path)
    checksummed_zip.verify(path)
    assert checksummed_zip.read_step(path) is None
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(50.0).numpy().tobytes()) + 17] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="data/0"):
        checksummed_zip.verify(path)
    # torch reads the damaged file, hence the checksum.
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], CONTENT["weights"])


def test_step_is_covered_by_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    content = write(path, 3)
    path.write_bytes(content.replace(b"step=%020d" % 3, b"step=%020d" % 4))
    assert checksummed_zip.read_step(path) == 4
    with pytest.raises(CheckpointError, match="bytes are not those"):
        checksummed_zip.verify(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    before = write(path)

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    init = checksummed_zip.ChecksummedZipWriter.__init__

    def init_full(self: checksummed_zip.ChecksummedZipWriter, temporary: Path) -> None:
        init(self, temporary)
        self._file = Full(temporary, "w")  # type: ignore[assignment]

    monkeypatch.setattr(checksummed_zip.ChecksummedZipWriter, "__init__", init_full)
    with pytest.raises(MemtxError, match="No space left on device"):
        write(path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
