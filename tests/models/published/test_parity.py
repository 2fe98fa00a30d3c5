"""The published models give the numbers of the library they come from, on every reference folder at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.models.encoder import Encoder
from memtx.models.published.load import KNOWN

TOLERANCE = 1e-4  # float32, sums in another order; the project's own promise
ENCODERS = ("bert", "distilbert", "longformer")
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "global_attention_mask")


def folders(parity: Path, *kinds: str) -> list[Path]:
    """The reference folders of these kinds, or skip."""
    found = [
        config.parent
        for config in sorted(parity.glob("*/config.json"))
        if json.loads(config.read_text()).get("model_type") in kinds
    ]
    if not found:
        pytest.skip(f"MEMTX_PARITY has no folder of {', '.join(kinds)}")
    return found


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_written_back_byte_for_byte(parity: Path, kind: str, tmp_path: Path) -> None:
    for folder in folders(parity, kind):
        memtx.from_pretrained(folder).to_pretrained(tmp_path / folder.name)
        own = load_file(tmp_path / folder.name / "model.safetensors")
        original = load_file(folder / "model.safetensors")
        assert own.keys() == original.keys()
        for name, tensor in original.items():
            assert own[name].dtype == tensor.dtype
            assert torch.equal(own[name], tensor), name
        assert (tmp_path / folder.name / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_hidden_state_and_logit(parity: Path, kind: str) -> None:
    for folder in folders(parity, kind):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, Encoder)
        with torch.no_grad():
            out = model(**{name: io[name] for name in ARGUMENTS if name in io}, output_hidden_states=True)
        compared = 0
        for name, wanted in io.items():
            part, _, layer = name.partition(".")
            if part == "hidden_states":
                own = out.hidden_states[int(layer)]
            elif part in ("last_hidden_state", "logits"):
                own = getattr(out, part)
            else:
                continue
            compared += 1
            assert (own - wanted).abs().max() < TOLERANCE, f"{folder.name}: {name}"
        assert compared, f"{folder.name} records nothing to compare"
