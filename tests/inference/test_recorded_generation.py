"""Greedy texts of every decoder layout with a tokenizer of its kind equal those recorded from transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memtx.checkpoint.load import load_model_and_tokenizer
from memtx.data.tokenizers import Tokenizer
from memtx.hf.loader import DECODERS
from memtx.inference.decoder import Decoder
from memtx.inference.generate import GenerationConfig, TextDelta, TokenGenerator, generate
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.models.memory_transformer import MemoryTransformer

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "recorded").glob("*/recorded.json"))
GREEDY = SamplingParams(greedy=True)


def windows(folder: Path) -> list[int | None]:
    """Return the windows that the records of a folder need; None is the trained length."""
    return list(dict.fromkeys(record.get("window") for record in json.loads((folder / "recorded.json").read_text())))


CASES = [
    pytest.param((folder, window), id=folder.name if window is None else f"{folder.name}-window-{window}")
    for folder in FOLDERS
    for window in windows(folder)
]


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[MemoryTransformer, Tokenizer, list[dict[str, Any]]]:
    folder, window = request.param
    model, tokenizer = load_model_and_tokenizer(folder, window)
    records = json.loads((folder / "recorded.json").read_text())
    return model, tokenizer, [record for record in records if record.get("window") == window]


def odd_pieces(text: str) -> Iterator[bytes]:
    """Yield the bytes of a text, cut inside characters and words."""
    content = text.encode()
    for start in range(0, len(content), 3):
        yield content[start : start + 3]


def run(reader: StreamReader, config: GenerationConfig) -> tuple[TokenGenerator, list[int], list[TextDelta]]:
    """Return a generator after a text, all ids that it chose, and its output."""
    token_generator = TokenGenerator(reader.tokenizer, reader.last_token, [], config)
    decoder, ids, deltas = Decoder(reader.model, reader.state), [], []
    while token_generator.finish_reason is None:
        logits = decoder.step(torch.tensor([token_generator.next_token]))
        deltas.append(token_generator.advance(logits[0]))
        ids.append(token_generator.next_token)
    return token_generator, ids, deltas


def test_every_decoder_layout_is_recorded() -> None:
    assert {folder.name for folder in FOLDERS} == set(DECODERS)


def test_a_line_says_which_factors_scale_the_positions(caplog: pytest.LogCaptureFixture) -> None:
    folder = next(folder for folder in FOLDERS if folder.name == "phi3")
    load_model_and_tokenizer(folder, 96)
    assert not caplog.text
    load_model_and_tokenizer(folder)
    assert "scaled by long_factor, as for texts beyond 96 tokens; a window of at most as many" in caplog.text


@pytest.mark.parametrize("segment_length", [512, 3])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_greedy_texts_equal_transformers(case: Any, segment_length: int, is_streamed: bool) -> None:
    model, tokenizer, records = case
    for record in records:
        reader = StreamReader(model, tokenizer, segment_length)
        pieces = odd_pieces(record["prompt"]) if is_streamed else iter([record["prompt"]])
        results = [result for piece in pieces for result in reader.feed(piece)] + list(reader.finish())
        prompt_ids = [*tokenizer.bos_token_ids, *np.concatenate([result.tokens for result in results]).tolist()]
        assert prompt_ids == record["prompt_ids"]
        settings: dict[str, Any] = {"max_tokens": len(record["endless_ids"]), "sampling_params": GREEDY, "logprobs": 1}
        stop = tuple(record["stop"])
        token_generator, ids, deltas = run(reader, GenerationConfig(stop_token_ids=stop, **settings))
        assert ids == record["ids"]
        assert token_generator.finish_reason == ("stop" if ids[-1] in stop else "length")
        text = "".join(delta.text for delta in deltas)
        assert record["prompt_text"] + text == record["text"]
        entries = [entry for delta in deltas for entry in delta.token_logprobs]
        text_ids = [token for token in ids if token not in stop]
        # The end token too has an entry, without text.
        assert [entry.token for entry in entries] == ids
        # float32, sums in another order
        assert [entry.logprob for entry in entries] == pytest.approx(record["logprobs"][: len(ids)], abs=1e-4)
        for index, entry in enumerate(entries):
            before = tokenizer.decode([*record["prompt_ids"], *text_ids[:index]])[len(record["prompt_text"]) :]
            # Bytes that are no character yet may become another one.
            if text.startswith(before) and not before.endswith("\ufffd"):
                assert entry.text_offset == len(before)
        # Without ends, the text goes on as the library's.
        assert run(reader, GenerationConfig(ignore_eos=True, **settings))[1] == record["endless_ids"]


def test_the_function_gives_the_same_text(case: Any) -> None:
    model, tokenizer, records = case
    for record in records:
        options: dict[str, Any] = {"max_tokens": len(record["endless_ids"]), "stop_token_ids": record["stop"]}
        parts = generate(model, tokenizer, record["prompt"], sampling_params=GREEDY, segment_length=5, **options)
        assert record["prompt_text"] + "".join(parts) == record["text"]
