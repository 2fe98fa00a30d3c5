"""Hugging Face folders: all formats on disk, byte-equal round trips, every mismatch named."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import memtx
from memtx.errors import CheckpointError, MemtxError
from memtx.models.encoder import Encoder
from tests.hf.folders import BERT, bert, write

TOKENS = torch.randint(1, 20, (2, 11), generator=torch.Generator().manual_seed(0))


def assert_unchanged(folder: Path, original: dict[str, Tensor], config: str) -> None:
    written = load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert (folder / "config.json").read_text() == config
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        assert handle.metadata()["format"] == "pt"  # transformers refuses a file without it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_model_is_saved_byte_for_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: x.to(dtype) for name, x in bert().items()}
    folder = write(tmp_path / "read", BERT, tensors)
    model = memtx.from_pretrained(folder)
    assert isinstance(model, Encoder)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    memtx.hf.save(model, tmp_path / "written")
    assert_unchanged(tmp_path / "written", tensors, (folder / "config.json").read_text())


def test_extra_tensors_of_the_layout_are_kept(tmp_path: Path) -> None:
    tensors = bert()
    embedding = tensors["bert.embeddings.word_embeddings.weight"]
    tensors |= {
        "bert.embeddings.position_ids": torch.arange(30)[None],
        "cls.seq_relationship.weight": torch.randn(2, 8),
        "cls.seq_relationship.bias": torch.randn(2),
        "bert.pooler.dense.weight": torch.randn(8, 8),
        "bert.pooler.dense.bias": torch.randn(8),
        # One weight under two names, as in files that do not share tensors.
        "cls.predictions.decoder.weight": embedding.clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }
    folder = write(tmp_path / "read", BERT, tensors)
    model = memtx.from_pretrained(folder)
    assert model(TOKENS).pooler_output.shape == (2, 8)
    memtx.hf.save(model, tmp_path / "written")
    assert_unchanged(tmp_path / "written", tensors, (folder / "config.json").read_text())
    # After training both names have the new weight.
    with torch.no_grad():
        model.embedding.word_embeddings.weight.add_(1.0)
    memtx.hf.save(model, tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"):
        assert torch.equal(trained[name], embedding + 1.0)


def test_decoder_with_other_values_is_untied(tmp_path: Path) -> None:
    tensors = bert()
    tensors["cls.predictions.decoder.weight"] = torch.randn(20, 8)
    folder = write(tmp_path / "read", BERT, tensors)
    model = memtx.from_pretrained(folder)
    assert torch.equal(model.head.weight, tensors["cls.predictions.decoder.weight"])
    memtx.hf.save(model, tmp_path / "written")
    assert_unchanged(tmp_path / "written", tensors, (folder / "config.json").read_text())
    untied = {name: x for name, x in tensors.items() if name != "cls.predictions.decoder.weight"}
    with pytest.raises(CheckpointError, match=r"lacks cls\.predictions\.decoder\.weight"):
        memtx.from_pretrained(write(tmp_path / "untied", {**BERT, "tie_word_embeddings": False}, untied))


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_pickle(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def write_without_prefix(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name.removeprefix("bert."): x for name, x in tensors.items()}, folder / "model.safetensors")


def write_legacy_norms(folder: Path, tensors: dict[str, Tensor]) -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    save_file(old, folder / "model.safetensors")


@pytest.mark.parametrize("form", [write_shards, write_pickle, write_without_prefix, write_legacy_norms])
def test_every_form_on_disk_gives_one_model(tmp_path: Path, form: Callable[[Path, dict[str, Tensor]], None]) -> None:
    tensors = bert()
    expected = memtx.from_pretrained(write(tmp_path / "one", BERT, tensors))(TOKENS).logits
    folder = write(tmp_path / "other", BERT, tensors)
    form(folder, tensors)
    assert torch.equal(memtx.from_pretrained(folder)(TOKENS).logits, expected)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = bert()
    del tensors["bert.encoder.layer.1.attention.self.query.bias"]
    del tensors["bert.embeddings.LayerNorm.weight"]
    tensors["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(3)
    tensors["something.else"] = torch.zeros(1)
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError) as error:
        memtx.from_pretrained(write(tmp_path, BERT, tensors))
    for message in (
        "lacks bert.encoder.layer.1.attention.self.query.bias",
        "lacks bert.embeddings.LayerNorm.weight",
        "has bert.encoder.layer.2.output.dense.weight, unknown",
        "has something.else, unknown",
        "has bert.encoder.layer.0.output.dense.bias of shape (9,) instead of (8,)",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "berd"}, "berd.*expected one of.*Did you mean 'bert'"),
        ({"model_type": "llamas"}, "expected one of .*distilbert"),
        ({"hidden_act": "gellu"}, "gellu.*Did you mean 'gelu'"),
        ({"hidden_size": 9}, "9"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"layer_norm_eps": -1}, "layer_norm_eps"),
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"num_hidden_layers": 3}, "lacks bert.encoder.layer.2"),
    ],
)
def test_error_names_the_config_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        memtx.from_pretrained(write(tmp_path, {**BERT, **change}, bert()))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_damaged_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "x", BERT, bert())
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="not a valid safetensors"):
        memtx.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        memtx.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        memtx.from_pretrained(folder)
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        memtx.from_pretrained(folder)
    assert "ran" not in capsys.readouterr().out
    (folder / "pytorch_model.bin").unlink()
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ({"weight_map": {"a": "../outside.safetensors"}}, "not a file in its folder"),
        ({"weight_map": {"a": "model-1.safetensors"}}, r"lacks model-1\.safetensors"),
        ({"other": 1}, "no weight_map"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            memtx.from_pretrained(folder)
    save_file({"b": torch.zeros(1)}, folder / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="lacks a, which the index"):
        memtx.from_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        memtx.from_pretrained(folder)


def test_models_without_hf_layout_need_save_pretrained(tmp_path: Path) -> None:
    model = Encoder(20, dim=8, depth=1, heads=2).eval()
    with pytest.raises(MemtxError, match="save_pretrained"):
        memtx.hf.save(model, tmp_path)
    model.save_pretrained(tmp_path)
    reloaded = memtx.from_pretrained(tmp_path)
    assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)
