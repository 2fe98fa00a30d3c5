from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from memtx.checkpoint import pretrained
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import ByteTokenizer, Tokenizer
from memtx.errors import CheckpointError, MemtxError
from memtx.models.memory_transformer import MemoryTransformer


def checkpoint(path: Path, model: MemoryTransformer, **changed: object) -> Path:
    content = {
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "memtx": {"model": pretrained.describe_model(model)},
        "BookDataModule": {"tokenizer": ByteTokenizer().to_json()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**content, **changed}, path)
    return path


def test_a_checkpoint_is_loaded(tmp_path: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    model, tokenizer = load_model_and_tokenizer(checkpoint(tmp_path / "a.ckpt", byte_model))
    assert (model.fingerprint, tokenizer.fingerprint) == (byte_model.fingerprint, byte_tokenizer.fingerprint)
    assert not model.training


def test_pretrained_folder_is_loaded(tmp_path: Path, byte_model: MemoryTransformer, byte_tokenizer: Tokenizer) -> None:
    byte_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_model_and_tokenizer(tmp_path)
    byte_tokenizer.save(tmp_path / "tokenizer.json")
    assert load_model_and_tokenizer(tmp_path)[0].fingerprint == byte_model.fingerprint


def test_a_run_folder_gives_its_best_or_newest(tmp_path: Path, byte_model: MemoryTransformer) -> None:
    other = MemoryTransformer(257, dim=16, depth=1, heads=2)
    old = checkpoint(tmp_path / "checkpoints" / "old.ckpt", byte_model)
    new = checkpoint(tmp_path / "checkpoints" / "new.ckpt", other)
    os.utime(old, (1, 1))
    assert (
        load_model_and_tokenizer(tmp_path)[0].fingerprint
        == load_model_and_tokenizer(tmp_path / "checkpoints")[0].fingerprint
        == other.fingerprint
    )
    # Even if the run was moved since: only the name counts.
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps({"path": "/elsewhere/checkpoints/old.ckpt"}))
    assert load_model_and_tokenizer(tmp_path)[0].fingerprint == byte_model.fingerprint
    old.unlink()
    assert load_model_and_tokenizer(tmp_path)[0].fingerprint == load_model_and_tokenizer(new)[0].fingerprint


@pytest.mark.parametrize("size", [0, 10, 2000, -100])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, size: int, byte_model: MemoryTransformer) -> None:
    path = checkpoint(tmp_path / "a.ckpt", byte_model)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        load_model_and_tokenizer(path)


def test_other_files_are_refused(tmp_path: Path, byte_model: MemoryTransformer) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model_and_tokenizer(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_model_and_tokenizer(tmp_path)
    (tmp_path / "book.txt").write_text("CHAPTER I")
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        load_model_and_tokenizer(tmp_path / "book.txt")
    torch.save({"state_dict": {}}, tmp_path / "else.ckpt")
    with pytest.raises(CheckpointError, match="was not written by memtx"):
        load_model_and_tokenizer(tmp_path / "else.ckpt")
    with pytest.raises(CheckpointError, match="no tokenizer in it"):
        load_model_and_tokenizer(checkpoint(tmp_path / "b.ckpt", byte_model, BookDataModule={}))
    with pytest.raises(MemtxError, match="tokenizer"):
        load_model_and_tokenizer(checkpoint(tmp_path / "c.ckpt", byte_model, BookDataModule={"tokenizer": "{}"}))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "memtx": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError):
        load_model_and_tokenizer(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
