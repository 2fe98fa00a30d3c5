"""Answers in the form of OpenAI's completions: choices, their log-probabilities and their usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from memtx.data.tokenizers import Tokenizer
from memtx.inference.continuation import Chosen, Piece
from memtx.inference.reader import SegmentResult


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; one that is no whole characters as OpenAI spells it, by its bytes' numbers."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def chosen_in(results: Iterable[SegmentResult]) -> list[Chosen]:
    """Return the tokens that were read, as if they had been made."""
    chosen, content = [], b""
    for result in results:
        for place, token in enumerate(result.tokens.tolist()):
            top: tuple[tuple[int, float], ...] = ()
            if result.top_tokens is not None and result.top_logprobs is not None:
                pairs = zip(result.top_tokens[place].tolist(), result.top_logprobs[place].tolist(), strict=True)
                top = tuple(pairs)
            chosen.append(Chosen(token, -float(result.nll[place]), top, len(content.decode("utf-8", "ignore"))))
            content += result.token_bytes[place]
    return chosen


@dataclass
class Answer:
    """What is said of one request, whole or in chunks.

    Attributes:
        model: its name.
        tokenizer: spells tokens.
        logprobs: whether log-probabilities are shown.
    """

    model: str
    tokenizer: Tokenizer
    logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, index: int, text: str, tokens: Iterable[Chosen], finish: str | None) -> Any:
        """Return one choice."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens) if self.logprobs else None,
            "finish_reason": finish,
        }

    def whole(self, choices: list[Any], usage: dict[str, int] | None) -> dict[str, Any]:
        """Return an answer, or a chunk of one."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({"usage": usage} if usage is not None else {}),
        }

    def _logprobs(self, tokens: Iterable[Chosen]) -> dict[str, Any]:
        chosen = list(tokens)
        return {
            "tokens": [spelled(self.tokenizer, one.token) for one in chosen],
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [{spelled(self.tokenizer, token): value for token, value in one.top} for one in chosen],
            "text_offset": [one.offset for one in chosen],
        }


@dataclass
class Made:
    """One choice as it grows."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take one more piece."""
        self.text += piece.text
        self.tokens += piece.tokens


def usage_of(prompt: int, made: int) -> dict[str, int]:
    """Return the tokens read and made."""
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
