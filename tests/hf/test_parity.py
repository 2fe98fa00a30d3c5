"""Models loaded from Hugging Face folders match recorded outputs of transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.hf.loader import DECODERS, ENCODERS, MODEL_TYPES
from memtx.inference.decoder import Decoder
from memtx.models.encoder import Encoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.reformer import Reformer
from memtx.models.transformer_xl import TransformerXL
from memtx.models.xlnet import XLNet
from memtx.ops.attention.sparse import sample_random_blocks

TOLERANCE = 1e-4  # float32, sums in another order
WITH_HIDDEN_STATES = ("bert", "big_bird", "distilbert", "longformer", "reformer")
ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "global_attention_mask")


def folders(parity: Path, *kinds: str) -> list[Path]:
    """Return the reference folders of these model types, or skip."""
    paths = [
        config.parent
        for config in sorted(parity.glob("*/config.json"))
        if json.loads(config.read_text()).get("model_type") in kinds
    ]
    if not paths:
        pytest.skip(f"MEMTX_PARITY has no folder of {', '.join(kinds)}")
    return paths


REFERENCE_CONFIGS = sorted(Path(os.environ.get("MEMTX_PARITY", "/nowhere")).glob("*/config.json"))


@pytest.mark.parametrize("config", REFERENCE_CONFIGS, ids=lambda config: str(config.parent.name))
def test_every_reference_folder_loads(config: Path) -> None:
    """Each folder is loaded, by which no layout stays untested without notice; one without a loader is a named skip."""
    kind = json.loads(config.read_text())["model_type"]
    if kind not in MODEL_TYPES:
        pytest.skip(f"reference folder '{config.parent.name}' ({kind}): not yet supported")
    assert any(True for _ in memtx.from_pretrained(config.parent).parameters())


@pytest.mark.parametrize("kind", sorted(ENCODERS | DECODERS))
def test_recorded_folders_are_saved_byte_for_byte(parity: Path, kind: str, tmp_path: Path) -> None:
    for folder in folders(parity, kind):
        memtx.hf.save(memtx.from_pretrained(folder), tmp_path / folder.name)
        actual = load_file(tmp_path / folder.name / "model.safetensors")
        original = load_file(folder / "model.safetensors")
        assert actual.keys() == original.keys()
        for name, tensor in original.items():
            assert actual[name].dtype == tensor.dtype
            assert torch.equal(actual[name], tensor), name
        assert (tmp_path / folder.name / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("kind", WITH_HIDDEN_STATES)
def test_hidden_states_and_logits_match(parity: Path, kind: str) -> None:
    for folder in folders(parity, kind):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, Encoder | Reformer)
        model.train(kind == "big_bird")  # which was recorded so, without dropout
        with torch.no_grad():
            out = model(**{name: io[name] for name in ARGUMENTS if name in io}, output_hidden_states=True)
        num_compared = 0
        for name, expected in io.items():
            part, _, layer = name.partition(".")
            if part == "hidden_states":
                actual = out.hidden_states[int(layer)]
            elif part in ("last_hidden_state", "logits"):
                actual = getattr(out, part)
            else:
                continue
            num_compared += 1
            # transformers returns the hidden states of Big Bird and Reformer with their internal padding.
            assert (actual - expected[:, : actual.shape[1]]).abs().max() < TOLERANCE, f"{folder.name}: {name}"
        assert num_compared, f"{folder.name} records nothing to compare"


CUTS = [[100], [1, 2, 30, 7, 60], [1] * 100]


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_logits_of_decoders_match_in_any_pieces_and_packed(parity: Path, kind: str) -> None:
    for folder in folders(parity, kind):
        io = load_file(folder / "io.safetensors")
        ids, expected = io["input_ids"], io["logits"]
        model = memtx.from_pretrained(folder)
        assert isinstance(model, MemoryTransformer)
        document_starts = torch.zeros(1, ids.numel(), dtype=torch.bool)
        document_starts[0, :: ids.shape[1]] = True
        decoder = Decoder(model, model.init_state(len(ids)))
        with torch.no_grad():
            results = {"packed": model(ids.view(1, -1), document_starts=document_starts).logits.view(expected.shape)}
            for lengths in CUTS:
                state, pieces = None, []
                for piece in ids.split(lengths, dim=1):
                    out = model(piece, state)
                    state = out.state
                    pieces.append(out.logits)
                results[f"{len(lengths)} pieces"] = torch.cat(pieces, dim=1)
            results["in place"] = torch.stack([decoder.step(tokens) for tokens in ids.unbind(1)], dim=1)
            exact = model.double()(ids).logits
        # The norm of reads near 0 magnifies float32's rounding, in the recorded logits of transformers as well.
        tolerance = max(TOLERANCE, 2 * (expected - exact).abs().max().item())
        assert (expected - exact).abs().max() < 1e-3, folder.name  # float32's rounding, magnified by such norms
        for name, logits in results.items():
            assert (logits - expected).abs().max() < tolerance, f"{folder.name}: {name}"


def test_transformer_xl_matches_in_every_segment(parity: Path) -> None:
    for folder in folders(parity, "transfo-xl"):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, TransformerXL)
        state, start = None, 0
        for segment in range(sum(name.startswith("log_probs.") for name in io)):
            expected = io[f"log_probs.{segment}"]
            with torch.no_grad():
                out = model(io["input_ids"][:, start : start + expected.shape[1]], state)
            state, start = out.state, start + expected.shape[1]
            assert out.logits is not None
            assert (out.logits - expected).abs().max() < TOLERANCE, f"{folder.name}: segment {segment}"
            for layer, (actual,) in enumerate(state.layers):
                difference = actual.hidden.transpose(0, 1) - io[f"mems.{segment}.{layer}"]
                assert difference.abs().max() < TOLERANCE, f"{folder.name}: memory {layer} after segment {segment}"


def test_xlnet_matches_without_and_with_its_memory(parity: Path) -> None:
    for folder in folders(parity, "xlnet"):
        io = load_file(folder / "io.safetensors")
        model = memtx.from_pretrained(folder)
        assert isinstance(model, XLNet)
        length = io["logits_first"].shape[1]
        with torch.no_grad():
            first = model(io["input_ids"][:, :length])
            masks = {name: io[name] for name in ("perm_mask", "target_mapping")}
            second = model(io["input_ids"][:, length:], state=first.state, **masks)
        assert (first.logits - io["logits_first"]).abs().max() < TOLERANCE
        assert (second.logits - io["logits_second"]).abs().max() < TOLERANCE


def test_random_blocks_match_recorded_ones_and_can_be_passed(parity: Path) -> None:
    for folder in folders(parity, "big_bird"):
        io = load_file(folder / "io.safetensors")
        recorded = {
            int(name.removeprefix("random_blocks.layer")): blocks
            for name, blocks in io.items()
            if name.startswith("random_blocks.layer")
        }
        model = memtx.from_pretrained(folder)
        assert isinstance(model, Encoder)
        model.train()  # since random blocks are drawn in training only
        size = folder_option(folder, "block_size")
        for layer, blocks in recorded.items():
            sampled = sample_random_blocks(
                (blocks.shape[1] + 2) * size,
                size,
                folder_option(folder, "num_random_blocks"),
                blocks.shape[0],
                max_length=folder_option(folder, "max_position_embeddings"),
                seed=layer,
            )
            assert torch.equal(sampled, blocks), f"{folder.name}: layer {layer}"
        with torch.no_grad():
            actual = model(io["input_ids"], io.get("attention_mask"))
            with_blocks = model(io["input_ids"], io.get("attention_mask"), random_blocks=recorded)
        assert torch.equal(actual.last_hidden_state, with_blocks.last_hidden_state)


def folder_option(folder: Path, key: str) -> int:
    return int(json.loads((folder / "config.json").read_text())[key])
