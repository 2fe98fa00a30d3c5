"""BigBird-Pegasus equals what transformers 5.24 recorded of two tiny random models, and samples by our own sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memtx
from memtx.errors import MemtxError
from memtx.inference.sampling import SamplingParams
from memtx.inference.text_to_text import make_sampler, read_sampling_params
from memtx.models.beam_search import BeamSearchOptions, generate_targets
from memtx.models.encoder_decoder import EncoderDecoder

FOLDERS = sorted((Path(__file__).parent / "bigbird_pegasus").iterdir())
"""Block-sparse attention with scaled embeddings and without biases, and the other way round."""


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def recorded(request: pytest.FixtureRequest) -> tuple[EncoderDecoder, dict[str, Tensor]]:
    model = memtx.from_pretrained(request.param)
    assert isinstance(model, EncoderDecoder)
    return model, load_file(request.param / "io.safetensors")


def generate(model: EncoderDecoder, io: dict[str, Tensor], num_beams: int = 1, **options: Any) -> list[list[int]]:
    search = BeamSearchOptions(num_beams, max_length=14)
    return generate_targets(
        model, io["input_ids"], io["attention_mask"], options=search, eos_token_ids=[1], **options
    )  # fmt: skip


def test_outputs_and_targets(recorded: tuple[EncoderDecoder, dict[str, Tensor]]) -> None:
    model, io = recorded
    with torch.no_grad():
        output = model(io["input_ids"], io["attention_mask"], decoder_input_ids=io["decoder_input_ids"])
    present = io["attention_mask"].bool()
    # float32, sums in another order
    torch.testing.assert_close(output.logits, io["logits"], atol=1e-4, rtol=0)
    expected = io["encoder_last_hidden_state"][present]
    torch.testing.assert_close(output.encoder_last_hidden_state[present], expected, atol=1e-4, rtol=0)  # float32
    for name, targets in (("greedy", generate(model, io)), ("beam", generate(model, io, num_beams=3))):
        assert targets == io[name].tolist()
    penalty = [SamplingParams(greedy=True, repetition_penalty=1.7)] * 2
    for target, padded in zip(generate(model, io, choose=make_sampler(penalty)), io["penalized"].tolist(), strict=True):
        assert target[: padded.index(1) + 1 if 1 in padded else None] == padded[: len(target)]


def test_it_is_written_back(recorded: tuple[EncoderDecoder, dict[str, Tensor]], tmp_path: Path) -> None:
    model, _ = recorded
    memtx.hf.save(model, tmp_path)
    again = memtx.from_pretrained(tmp_path)
    assert again.fingerprint == model.fingerprint
    model.save_pretrained(tmp_path / "own")
    assert memtx.from_pretrained(tmp_path / "own").fingerprint == model.fingerprint


def test_targets_are_sampled_from_the_filtered_distribution() -> None:
    model, io = memtx.from_pretrained(FOLDERS[0]), load_file(FOLDERS[0] / "io.safetensors")
    assert isinstance(model, EncoderDecoder)
    greedy = generate(model, io)
    assert generate(model, io, choose=make_sampler([SamplingParams(top_k=1)] * 2)) == greedy
    hot = [SamplingParams(temperature=2.0)] * 2
    first, again, other = (generate(model, io, choose=make_sampler(hot, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    # The first token of many samples against the softmax of the same logits.
    count, hidden = 2000, model.encode(io["input_ids"][:1])
    logits, _ = model.decode(torch.full((1, 1), 2), model.start(hidden))
    expected = torch.softmax(logits[0, -1] / 2.0, dim=0)
    choose = make_sampler([SamplingParams(temperature=2.0)] * count)
    tokens = choose(logits[:, -1].log_softmax(-1).expand(count, -1), [[2]] * count)
    shares = torch.bincount(torch.tensor(tokens), minlength=len(expected)) / count
    assert (shares - expected).abs().max() < 0.05  # four standard deviations of a share of a half
    with pytest.raises(MemtxError, match="num_beams is 3, but a single target"):
        generate(model, io, num_beams=3, choose=choose)


def test_options_of_a_folder_are_those_of_the_library() -> None:
    assert read_sampling_params({"do_sample": True, "temperature": 0.7}, 1) == SamplingParams(0.7, top_k=50)
    assert read_sampling_params({"do_sample": True, "top_k": 9}, 1) == SamplingParams(top_k=9)
    assert read_sampling_params({"temperature": 0.7, "top_k": 9}, 1) is None
    assert read_sampling_params({"do_sample": True}, 4) is None
    assert read_sampling_params({"repetition_penalty": 1.3}, 1) == SamplingParams(greedy=True, repetition_penalty=1.3)
