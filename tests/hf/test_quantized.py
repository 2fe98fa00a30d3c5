"""Quantized folders are refused in one line that names the quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import memtx
from memtx.errors import CheckpointError
from tests.hf.folders import BERT, bert, write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization_config with quant_method 'gptq'"),
        ({"quant_method": "awq"}, "quantization_config with quant_method 'awq'"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantization_config with quant_method 'bitsandbytes'",
        ),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "quant_method 'compressed-tensors'"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "quant_method 'fp8'"),
        ({"load_in_8bit": True}, "quantization_config with quant_method 'unknown'"),
    ],
)
def test_a_quantized_folder_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    for config in ({"quantization_config": options}, {"text_config": {"quantization_config": options}}):
        folder = write(tmp_path, {**BERT, **config}, bert())
        with pytest.raises(CheckpointError, match=message):
            memtx.from_pretrained(folder)
    # Of any layout, and before a tensor is read.
    folder = write(tmp_path, {"model_type": "unheard", "quantization_config": options}, {})
    with pytest.raises(CheckpointError, match="holds quantized weights"):
        memtx.from_pretrained(folder)


def test_a_quantizer_with_its_switches_off_holds_plain_weights(tmp_path: Path) -> None:
    options = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
    }
    memtx.from_pretrained(write(tmp_path, {**BERT, "quantization_config": options}, bert()))


def test_a_quantizer_that_writes_its_own_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {**BERT, "quantization_config": None}, bert())
    memtx.from_pretrained(folder)
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json in place of a quantization_config"):
        memtx.from_pretrained(folder)


def test_a_folder_without_weights_of_its_own_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"consolidated\.safetensors, model-Q4_K_M\.gguf cannot be read"):
        memtx.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter: merge it into its base model"):
        memtx.from_pretrained(tmp_path)
