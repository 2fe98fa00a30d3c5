from __future__ import annotations

import math

import pytest
import torch

from memtx.data.tokenizers import ByteTokenizer
from memtx.errors import MemtxError
from memtx.inference.continuation import FULL, STOPPED, Continuation, Piece, Request
from memtx.inference.sampling import Sampling

GREEDY = Sampling(greedy=True)


def logits_for(token: int) -> torch.Tensor:
    logits = torch.zeros(260)
    logits[token] = 5.0
    logits[256] = 9.0  # begin, which is no text
    logits[259] = 9.0  # beyond the tokenizer
    return logits


def spelled(content: bytes, **options: object) -> tuple[Continuation, list[Piece]]:
    text = Continuation(ByteTokenizer(), 256, [], Request(sampling=GREEDY, **options))  # type: ignore[arg-type]
    pieces = []
    for byte in content:
        if text.finish is not None:
            break
        pieces.append(text.advance(logits_for(byte)))
    return text, pieces


def test_log_probabilities_are_the_models_own() -> None:
    text, pieces = spelled(b"ab", max_tokens=2, top=2)
    whole = math.log(257 * 1 + math.exp(5) + 2 * math.exp(9))
    for piece, byte in zip(pieces, b"ab", strict=True):
        (chosen,) = piece.tokens
        assert chosen.token == byte
        assert chosen.logprob == pytest.approx(5 - whole, abs=1e-5)  # float32
        assert chosen.top[0] == (byte, pytest.approx(5 - whole, abs=1e-5))
        assert len(chosen.top) == 2
    assert text.finish == FULL


def test_tokens_come_with_their_characters() -> None:
    _, pieces = spelled("aé🙂z".encode(), max_tokens=8, top=0)
    shown = [(piece.text, len(piece.tokens)) for piece in pieces if piece.text]
    assert shown == [("a", 1), ("é", 2), ("🙂", 4), ("z", 1)]
    assert [chosen.offset for piece in pieces for chosen in piece.tokens] == [0, 1, 1, 2, 2, 2, 2, 3]


def test_tokens_of_a_stop_string_are_not_shown() -> None:
    text, pieces = spelled(b"abcdef", max_tokens=6, top=0, stop=("cd",))
    assert "".join(piece.text for piece in pieces) == "ab"
    assert sum(len(piece.tokens) for piece in pieces) == 2
    assert (text.finish, text.made) == (STOPPED, 4)


def test_what_is_cut_off_is_shown_at_the_end() -> None:
    text, pieces = spelled("aé".encode(), max_tokens=2, top=0, stop=("ax",))
    assert "".join(piece.text for piece in pieces) == "a\ufffd"
    assert sum(len(piece.tokens) for piece in pieces) == 2
    assert text.finish == FULL


def test_mistakes_are_named() -> None:
    for options, said in (
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"top": -1}, "top is -1"),
        ({"seed": 2**64}, "64 bits"),
        ({"stop": ("",)}, "stop string is empty"),
    ):
        with pytest.raises(MemtxError, match=said):
            Request(**options)  # type: ignore[arg-type]
    assert Continuation(ByteTokenizer(), 0, [], Request(max_tokens=0)).finish == FULL
