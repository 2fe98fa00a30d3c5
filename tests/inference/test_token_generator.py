from __future__ import annotations

import math

import pytest
import torch

from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import MemtxError
from memtx.inference.sampling import SamplingParams
from memtx.inference.token_generator import FINISH_LENGTH, FINISH_STOP, GenerationConfig, TextDelta, TokenGenerator

GREEDY = SamplingParams(greedy=True)


def logits_for(token: int) -> torch.Tensor:
    logits = torch.zeros(260)
    logits[token] = 5.0
    logits[256] = 9.0  # begin, which is no text
    logits[259] = 9.0  # beyond the tokenizer
    return logits


def spelled(content: bytes, **options: object) -> tuple[TokenGenerator, list[TextDelta]]:
    text = TokenGenerator(ByteTokenizer(), 256, [], GenerationConfig(sampling_params=GREEDY, **options))  # type: ignore[arg-type]
    pieces = []
    for byte in content:
        if text.finish_reason is not None:
            break
        pieces.append(text.advance(logits_for(byte)))
    return text, pieces


def test_log_probabilities_are_the_models_own() -> None:
    text, pieces = spelled(b"ab", max_tokens=2, logprobs=2)
    whole = math.log(257 * 1 + math.exp(5) + 2 * math.exp(9))
    for piece, byte in zip(pieces, b"ab", strict=True):
        (chosen,) = piece.token_logprobs
        assert chosen.token == byte
        assert chosen.logprob == pytest.approx(5 - whole, abs=1e-5)  # float32
        assert chosen.top_logprobs[0] == (byte, pytest.approx(5 - whole, abs=1e-5))
        assert len(chosen.top_logprobs) == 2
    assert text.finish_reason == FINISH_LENGTH


def test_tokens_come_with_their_characters() -> None:
    _, pieces = spelled("aé🙂z".encode(), max_tokens=8, logprobs=0)
    shown = [(piece.text, len(piece.token_logprobs)) for piece in pieces if piece.text]
    assert shown == [("a", 1), ("é", 2), ("🙂", 4), ("z", 1)]
    assert [chosen.text_offset for piece in pieces for chosen in piece.token_logprobs] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_tokens_of_a_stop_string_are_not_shown() -> None:
    text, pieces = spelled(b"abcdef", max_tokens=6, logprobs=0, stop=("cd",))
    assert "".join(piece.text for piece in pieces) == "ab"
    assert sum(len(piece.token_logprobs) for piece in pieces) == 2
    assert (text.finish_reason, text.num_generated) == (FINISH_STOP, 4)


def test_what_is_cut_off_is_shown_at_the_end() -> None:
    text, pieces = spelled("aé".encode(), max_tokens=2, logprobs=0, stop=("ax",))
    assert "".join(piece.text for piece in pieces) == "a\ufffd"
    assert sum(len(piece.token_logprobs) for piece in pieces) == 2
    assert text.finish_reason == FINISH_LENGTH


def test_mistakes_are_named() -> None:
    for options, said in (
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"seed": 2**64}, "64 bits"),
        ({"stop": ("",)}, "stop string is empty"),
    ):
        with pytest.raises(MemtxError, match=said):
            GenerationConfig(**options)  # type: ignore[arg-type]
    assert TokenGenerator(ByteTokenizer(), 0, [], GenerationConfig(max_tokens=0)).finish_reason == FINISH_LENGTH
