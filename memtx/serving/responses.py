"""Answers in the form of OpenAI's completions: choices, their log-probabilities and their usage."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from memtx.data.tokenizers import Tokenizer
from memtx.inference.generate import TextDelta, TokenLogprob
from memtx.inference.reader import SegmentResult


def format_token(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text; one that is no whole characters as OpenAI spells it, by its bytes' numbers."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def get_prompt_logprobs(results: Iterable[SegmentResult]) -> list[TokenLogprob]:
    """Return the tokens that were read, as if they had been made."""
    chosen, content = [], b""
    for result in results:
        for place, token in enumerate(result.tokens.tolist()):
            top: tuple[tuple[int, float], ...] = ()
            if result.top_tokens is not None and result.top_logprobs is not None:
                pairs = zip(result.top_tokens[place].tolist(), result.top_logprobs[place].tolist(), strict=True)
                top = tuple(pairs)
            chosen.append(TokenLogprob(token, -float(result.nll[place]), top, len(content.decode("utf-8", "ignore"))))
            content += result.token_bytes[place]
    return chosen


@dataclass
class CompletionFormatter:
    """What is said of one request, whole or in chunks.

    Attributes:
        model: its name.
        tokenizer: spells tokens.
        include_logprobs: whether log-probabilities are shown.
    """

    model: str
    tokenizer: Tokenizer
    include_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def format_choice(self, index: int, text: str, tokens: Iterable[TokenLogprob], finish_reason: str | None) -> Any:
        """Return one choice."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(tokens) if self.include_logprobs else None,
            "finish_reason": finish_reason,
        }

    def format_response(self, choices: list[Any], usage: dict[str, int] | None) -> dict[str, Any]:
        """Return an answer, or a chunk of one."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({"usage": usage} if usage is not None else {}),
        }

    def _format_logprobs(self, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
        chosen = list(tokens)
        return {
            "tokens": [format_token(self.tokenizer, one.token) for one in chosen],
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [
                {format_token(self.tokenizer, token): value for token, value in one.top_logprobs} for one in chosen
            ],
            "text_offset": [one.text_offset for one in chosen],
        }


@dataclass
class ChoiceBuilder:
    """One choice as it grows."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)

    def add(self, piece: TextDelta) -> None:
        """Take one more piece."""
        self.text += piece.text
        self.tokens += piece.token_logprobs


def format_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the tokens read and made."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
