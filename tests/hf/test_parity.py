"""The published models give the numbers of the library they come from, on every reference folder at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.hf.loader import MODEL_TYPES
from memtx.models.encoder import Encoder
from memtx.models.reformer import Reformer
from memtx.models.transformer_xl import TransformerXL
from memtx.ops.attention.sparse import sample_random_blocks

TOLERANCE = 1e-4  # float32, sums in another order; the project's own promise
READERS = ("bert", "big_bird", "distilbert", "longformer", "reformer")
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


@pytest.mark.parametrize("kind", sorted(MODEL_TYPES))
def test_written_back_byte_for_byte(parity: Path, kind: str, tmp_path: Path) -> None:
    for folder in folders(parity, kind):
        memtx.hf.save(memtx.from_pretrained(folder), tmp_path / folder.name)
        own = load_file(tmp_path / folder.name / "model.safetensors")
        original = load_file(folder / "model.safetensors")
        assert own.keys() == original.keys()
        for name, tensor in original.items():
            assert own[name].dtype == tensor.dtype
            assert torch.equal(own[name], tensor), name
        assert (tmp_path / folder.name / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("kind", READERS)
def test_every_hidden_state_and_logit(parity: Path, kind: str) -> None:
    for folder in folders(parity, kind):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, Encoder | Reformer)
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
            # The library hands out the hidden states of Big Bird and Reformer with the padding it adds within.
            assert (own - wanted[:, : own.shape[1]]).abs().max() < TOLERANCE, f"{folder.name}: {name}"
        assert compared, f"{folder.name} records nothing to compare"


def test_every_segment_of_transformer_xl_and_its_state(parity: Path) -> None:
    for folder in folders(parity, "transfo-xl"):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, TransformerXL)
        state, read = None, 0
        for segment in range(sum(name.startswith("log_probs.") for name in io)):
            wanted = io[f"log_probs.{segment}"]
            with torch.no_grad():
                out = model(io["input_ids"][:, read : read + wanted.shape[1]], state)
            state, read = out.state, read + wanted.shape[1]
            assert out.logits is not None
            assert (out.logits - wanted).abs().max() < TOLERANCE, f"{folder.name}: segment {segment}"
            for layer, (own,) in enumerate(state.layers):
                gap = own.hidden.transpose(0, 1) - io[f"mems.{segment}.{layer}"]
                assert gap.abs().max() < TOLERANCE, f"{folder.name}: memory {layer} after segment {segment}"


def test_random_blocks_are_those_recorded_and_can_be_given(parity: Path) -> None:
    for folder in folders(parity, "big_bird"):
        io = load_file(folder / "io.safetensors")
        recorded = {
            int(name.removeprefix("random_blocks.layer")): blocks
            for name, blocks in io.items()
            if name.startswith("random_blocks.layer")
        }
        model = memtx.from_pretrained(folder)
        assert isinstance(model, Encoder)
        size = folder_option(folder, "block_size")
        for layer, blocks in recorded.items():
            drawn = sample_random_blocks(
                (blocks.shape[1] + 2) * size,
                size,
                folder_option(folder, "num_random_blocks"),
                blocks.shape[0],
                max_length=folder_option(folder, "max_position_embeddings"),
                seed=layer,
            )
            assert torch.equal(drawn, blocks), f"{folder.name}: layer {layer}"
        with torch.no_grad():
            own = model(io["input_ids"], io.get("attention_mask"))
            given = model(io["input_ids"], io.get("attention_mask"), random_blocks=recorded)
        assert torch.equal(own.last_hidden_state, given.last_hidden_state)


def folder_option(folder: Path, key: str) -> int:
    return int(json.loads((folder / "config.json").read_text())[key])
