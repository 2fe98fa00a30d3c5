"""Greedy decoding and beam search: the ids of transformers, recorded with many options, and rules of the options."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import memtx
from memtx.errors import MemtxError
from memtx.models.beam_search import BeamSearchOptions, generate_targets
from memtx.models.encoder import Encoder
from memtx.models.encoder_decoder import EncoderDecoder
from tests.hf.test_parity import folders

RUNS = json.loads((Path(__file__).parent / "recorded" / "beams.json").read_text())["runs"]
INPUTS = ("input_ids", "attention_mask", "global_attention_mask")


def small_model() -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(30, partial(Encoder, dim=16, depth=1, heads=2, add_mlm_head=False), depth=2, heads=2)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


def test_recorded_targets(parity: Path) -> None:
    for folder in folders(parity, "led"):
        io, model = load_file(folder / "io.safetensors"), memtx.from_pretrained(folder)
        inputs = [io[name] for name in INPUTS]
        for name, num_beams in (("greedy", 1), ("beam3", 3)):
            options = BeamSearchOptions(num_beams=num_beams, max_length=24)
            assert generate_targets(model, *inputs, options=options, eos_token_ids=[2]) == io[name].tolist()


def test_recorded_targets_with_every_option(parity: Path) -> None:
    """Random end tokens and biases of the output, so that hypotheses end at all lengths."""
    folder = parity / "led"
    if not folder.is_dir():
        pytest.skip("MEMTX_PARITY has no folder 'led', of which the targets were recorded")
    io, model = load_file(folder / "io.safetensors"), memtx.from_pretrained(folder)
    bias = model.logits_bias.clone()
    for run in RUNS:
        noise = torch.randn(1, 120, generator=torch.Generator().manual_seed(run["bias_seed"])) * 6
        noise[:, 2] = run["end_bias"]
        model.logits_bias = bias + noise
        options = BeamSearchOptions(**run["options"])
        targets = generate_targets(model, *(io[name] for name in INPUTS), options=options, eos_token_ids=run["eos"])
        assert targets == run["ids"], run["options"]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_text_is_decoded_as_if_it_were_alone(num_beams: int) -> None:
    model, tokens = small_model(), torch.randint(3, 30, (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    options = BeamSearchOptions(num_beams=num_beams, max_length=12, no_repeat_ngram_size=2)
    together = generate_targets(model, tokens, mask, options=options, eos_token_ids=[4])
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = generate_targets(model, tokens[row : row + 1, :length], options=options, eos_token_ids=[4])
        assert together[row] == alone[0]


def test_options_are_obeyed() -> None:
    model, tokens = small_model(), torch.randint(3, 30, (2, 9))
    options = BeamSearchOptions(
        num_beams=3, max_length=10, min_length=6, no_repeat_ngram_size=2, forced_bos_token_id=7, forced_eos_token_id=5
    )
    for target in generate_targets(model, tokens, options=options, eos_token_ids=[5, 9]):
        assert target[:2] == [2, 7]
        assert len(target) > 6
        pairs = list(itertools.pairwise(target))
        assert len(set(pairs)) == len(pairs)
        assert target[-1] in (5, 9)


def test_an_error_before_a_step_ends_the_search() -> None:
    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        generate_targets(
            small_model(), torch.ones(1, 4, dtype=torch.int64), options=BeamSearchOptions(), before_step=stop
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        BeamSearchOptions(**options)


def test_targets_longer_than_the_positions_are_refused() -> None:
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(MemtxError, match="max_length is 2000, the decoder has 1024 positions"):
        generate_targets(small_model(), tokens, options=BeamSearchOptions(max_length=2000))
