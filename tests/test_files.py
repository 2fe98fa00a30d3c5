"""Atomic files, and errors that name the reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memtx import files
from memtx.errors import CheckpointError, MemtxError


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_text(path, "old")

    def fail_during_write() -> None:
        with files.atomic_open(path) as handle:
            handle.write(b"half of the n")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail_during_write()
    assert path.read_text() == "old"
    assert file_names(tmp_path) == ["a"]


def test_new_content_appears_only_on_success(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    with files.atomic_open(path) as handle:
        handle.write(b"new")
        handle.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert file_names(path.parent) == ["a"]


def test_concurrent_writers_do_not_mix_content(tmp_path: Path) -> None:
    with files.atomic_open(tmp_path / "a") as first:
        with files.atomic_open(tmp_path / "a") as second:
            first.write(b"one")
            second.write(b"two")
        assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").read_bytes() == b"one"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "x"),
        lambda path: files.save_tensors(path, {"a": torch.zeros(1)}, kind="k", version=1),
    ],
    ids=["text", "tensors"],
)
def test_unwritable_folder_is_reported(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a"  # its folder is a file
    with pytest.raises(MemtxError, match="could not be written"):
        write(path)


def test_save_tensors_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(MemtxError, match="No space left"):
        files.save_tensors(tmp_path / "a", {"a": torch.zeros(1)}, kind="k", version=1)
    assert file_names(tmp_path) == []


def test_json_is_read_back_and_invalid_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, None, "ü"], "a": 0.1})
    assert files.read_json(path) == {"a": 0.1, "b": [1, None, "ü"]}
    with pytest.raises(MemtxError, match="does not exist"):
        files.read_json(tmp_path / "b.json")
    with pytest.raises(MemtxError, match="could not be read"):
        files.read_json(tmp_path)
    for damaged in (b"{", b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(MemtxError, match="not valid JSON"):
            files.read_json(path)


def test_checksum_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a").write_bytes(content)
    assert files.checksum(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_tensors_that_share_memory_are_restored(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    written = {"base": base, "same": base, "transposed": base.T, "part": base[1:], "empty": base[:0]}
    files.save_tensors(tmp_path / "a", written, kind="k", version=3, note="n")
    tensors, header = files.load_tensors(tmp_path / "a", kind="k", version=3)
    assert header["note"] == "n"
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in written.items())


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        files.load_tensors(tmp_path / "a.pt", kind="k", version=1)


def test_folder_replaces_folder_or_file(tmp_path: Path) -> None:
    def folder(name: str, content: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(content)
        return tmp_path / name

    target = tmp_path / "place"
    files.replace(folder("first", "1"), target)
    files.replace(folder("second", "2"), target)
    assert file_names(tmp_path) == ["place"]
    assert (target / "a").read_text() == "2"
    # A file replaces a folder, and a folder replaces a file.
    (tmp_path / "file").write_text("3")
    files.replace(tmp_path / "file", target)
    assert target.read_text() == "3"
    files.replace(folder("third", "4"), target)
    assert (target / "a").read_text() == "4"
    assert file_names(tmp_path) == ["place"]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted_replace_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """After an interrupt before any rename or removal, recover restores one of the two folders."""
    target, source = tmp_path / "place", tmp_path / "source"
    for folder in (target, source):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    calls = 0

    def interrupt_at_stop(function: Callable[..., object]) -> Callable[..., object]:
        def count_call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return function(*arguments)

        return count_call

    monkeypatch.setattr(Path, "rename", interrupt_at_stop(Path.rename))
    monkeypatch.setattr(files.shutil, "rmtree", interrupt_at_stop(files.shutil.rmtree))
    with pytest.raises(KeyboardInterrupt):
        files.replace(source, target)
    monkeypatch.undo()
    files.recover(target)
    assert (target / "a").read_text() == ("source" if stop == 3 else "place")
    files.recover(target)
    assert target.exists()
