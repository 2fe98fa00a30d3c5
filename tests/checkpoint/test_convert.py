"""Conversion keeps the model in every format and never leaves a partial folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.checkpoint.convert import convert
from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import CheckpointError, MemtxError
from memtx.inference.predictor import Predictor
from memtx.memory.compressed import CompressedMemory
from memtx.models.add_memory import Retrofit
from memtx.models.memory_transformer import MemoryTransformer
from tests.hf import plain
from tests.hf.folders import write
from tests.inference.test_loading import checkpoint
from tests.tasks import predictor


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_converts_to_folder(tmp_path: Path, byte_model: MemoryTransformer) -> None:
    path = checkpoint(tmp_path / "a.ckpt", byte_model)
    result = convert(path, tmp_path / "deep" / "out")
    assert result.model_class == "MemoryTransformer"
    assert result.num_parameters == sum(parameter.numel() for parameter in byte_model.parameters())
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["config.json", "model.safetensors", "tokenizer.json"]
    model, tokenizer = load_model_and_tokenizer(tmp_path / "deep" / "out")
    assert model.fingerprint == byte_model.fingerprint
    assert tokenizer.to_json() == ByteTokenizer().to_json()
    # A pretrained folder is also a source; a checkpoint without text has no tokenizer.
    assert convert(tmp_path / "deep" / "out", tmp_path / "again").extra_files == ["tokenizer.json"]
    assert load_model_and_tokenizer(tmp_path / "again")[0].fingerprint == byte_model.fingerprint
    bare = checkpoint(tmp_path / "b.ckpt", byte_model, BookDataModule={})
    assert convert(bare, tmp_path / "bare").extra_files == []


def test_existing_target_is_kept(tmp_path: Path, byte_model: MemoryTransformer) -> None:
    path = checkpoint(tmp_path / "a.ckpt", byte_model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(MemtxError, match=r"already exists.*--overwrite"):
        convert(path, tmp_path / "out")
    with pytest.raises(MemtxError, match="already exists"):
        convert(path, path)
    with pytest.raises(MemtxError, match="is the source"):
        convert(path, path, overwrite=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a valid checkpoint"):
        convert(path, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["a.ckpt", "out"]
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    convert(checkpoint(path, byte_model), tmp_path / "out", overwrite=True)
    assert "mine" not in names(tmp_path / "out")


def test_hf_model_converts_both_ways(tmp_path: Path) -> None:
    base = write(tmp_path / "base", plain.QWEN3, plain.llama(plain.QWEN3))
    convert(base, tmp_path / "ours")
    assert "class_path" in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert memtx.from_pretrained(tmp_path / "ours").fingerprint == memtx.from_pretrained(base).fingerprint
    convert(tmp_path / "ours", tmp_path / "back", layout=base)
    assert (tmp_path / "back" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    back, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", base))
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in first.items())


def test_conversion_to_hf_drops_added_memories(tmp_path: Path) -> None:
    base = write(tmp_path / "base", plain.QWEN3, plain.llama(plain.QWEN3))
    model = Retrofit(str(base), [partial(CompressedMemory, window=4, compression_rate=2, num_entries=6)])(40)
    with torch.no_grad():
        model.embedding.weight += 1.0
    result = convert(checkpoint(tmp_path / "a.ckpt", model), tmp_path / "back", layout=base)
    assert result.dropped_weights
    assert all(".attention." in name for name in result.dropped_weights)
    weight = memtx.from_pretrained(tmp_path / "back").embedding.weight
    assert torch.equal(weight, model.embedding.weight)
    other = MemoryTransformer(40, dim=16, depth=1, heads=2)
    with pytest.raises(CheckpointError, match="does not have the layout"):
        convert(checkpoint(tmp_path / "b.ckpt", other), tmp_path / "wrong", layout=base)
    with pytest.raises(CheckpointError, match="is not a Hugging Face folder"):
        convert(tmp_path / "a.ckpt", tmp_path / "wrong", layout=tmp_path)
    assert not (tmp_path / "wrong").exists()


def test_conversion_keeps_the_task(tmp_path: Path) -> None:
    original = predictor("classification")
    original.save(tmp_path / "task")
    assert convert(tmp_path / "task", tmp_path / "out").extra_files == ["task.json", "tokenizer.json"]
    texts = ["the white whale", "a dark storm ."]
    assert Predictor.load(tmp_path / "out").predict(texts) == original.predict(texts)
