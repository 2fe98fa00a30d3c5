"""Fine-tuned encoders in the published layouts: logits equal those that transformers gave; quantized folders."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.errors import CheckpointError
from memtx.models.encoder import Encoder
from memtx.models.heads import TaskModel
from tests.hf.folders import write

RECORDED = json.loads((Path(__file__).parent / "fixtures" / "task_heads.json").read_text(encoding="utf-8"))["cases"]


def draw(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return the weights of a recorded model, drawn from a seed by name."""
    tensors = {}
    for name, shape in shapes.items():
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * 0.3
        tensors[name] = torch.from_numpy(np.asarray(x + 1 if "norm" in name.lower() and "weight" in name else x))
    return tensors


@pytest.mark.parametrize("name", RECORDED)
def test_logits_are_those_recorded(tmp_path: Path, name: str) -> None:
    case = RECORDED[name]
    folder = write(tmp_path / "model", case["config"], draw(case["shapes"]))
    model = memtx.from_pretrained(folder)
    tokens, mask, types, globals_ = (
        torch.tensor(case[key]) if case[key] is not None else None
        for key in ("input_ids", "attention_mask", "token_type_ids", "global_attention_mask")
    )
    assert tokens is not None
    assert mask is not None
    with torch.no_grad():
        if isinstance(model, TaskModel):
            logits = model(tokens, mask, types, globals_)
        else:
            assert isinstance(model, Encoder)
            logits = model(tokens, mask, types).logits
    expected = torch.tensor(case["logits"]).view(case["shape"])
    is_text = mask.bool() if len(case["shape"]) == 3 else torch.ones(2, dtype=torch.bool)
    # float32 sums in another order, of weights wider than any trained model's
    torch.testing.assert_close(logits[is_text], expected[is_text], atol=2e-4, rtol=1e-4)
    memtx.hf.save(model, tmp_path / "saved")
    original, saved = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "saved"))
    assert original.keys() == saved.keys()
    assert all(torch.equal(original[key], saved[key]) for key in original)


def test_a_head_that_is_missing_is_named(tmp_path: Path) -> None:
    case = RECORDED["BertForTokenClassification"]
    tensors = {key: tensor for key, tensor in draw(case["shapes"]).items() if not key.startswith("classifier")}
    with pytest.raises(CheckpointError, match=r"lacks classifier\.weight"):
        memtx.from_pretrained(write(tmp_path, case["config"], tensors))
    config = {**case["config"], "architectures": ["BertForMultipleChoice"]}
    folder = write(tmp_path, config, draw(case["shapes"]))
    with pytest.raises(CheckpointError, match="BertForMultipleChoice, whose task is not supported"):
        memtx.from_pretrained(folder)
