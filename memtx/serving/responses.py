"""Responses in the format of OpenAI completions, whole or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from anyio import CancelScope, to_thread
from fastapi import Request

from memtx.data.tokenizers import Tokenizer
from memtx.inference.deadline import remaining_seconds
from memtx.inference.engine import Generation, QueueItem
from memtx.inference.generate import TextDelta, TokenLogprob
from memtx.inference.reader import SegmentResult
from memtx.serving.errors import APIError, error_body, to_api_error

DISCONNECT_POLL_SECONDS = 0.5

OutputStream = AsyncIterator[tuple[int, TextDelta]]
"""Pairs of a text's index and its next piece."""


def format_token(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a token, with incomplete characters as escaped bytes in OpenAI's notation."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def get_prompt_logprobs(results: Iterable[SegmentResult]) -> list[TokenLogprob]:
    """Return the log-probabilities of the tokens of a prompt."""
    logprobs, content = [], b""
    for result in results:
        for index, token in enumerate(result.tokens.tolist()):
            top: tuple[tuple[int, float], ...] = ()
            if result.top_tokens is not None and result.top_logprobs is not None:
                top = tuple(zip(result.top_tokens[index].tolist(), result.top_logprobs[index].tolist(), strict=True))
            offset = len(content.decode("utf-8", "ignore"))
            logprobs.append(TokenLogprob(token, -float(result.nll[index]), top, offset))
            content += result.token_bytes[index]
    return logprobs


@dataclass
class CompletionFormatter:
    """Formatter of the response to one request, whole or in chunks, with log-probabilities if they were requested."""

    model: str
    tokenizer: Tokenizer
    include_logprobs: bool
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def format_choice(
        self, index: int, text: str, logprobs: Iterable[TokenLogprob] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        """Return one choice."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(list(logprobs)) if self.include_logprobs else None,
            "finish_reason": finish_reason,
        }

    def format_response(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a response, or a chunk of one."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({"usage": usage} if usage is not None else {}),
        }

    def _format_logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        to_text = partial(format_token, self.tokenizer)
        return {
            "tokens": [to_text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{to_text(token): value for token, value in entry.top_logprobs} for entry in logprobs],
            "text_offset": [entry.text_offset for entry in logprobs],
        }


class TokenQueue:
    """Queue from the engine's thread to one event loop, for the pieces of several texts."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, QueueItem]] = asyncio.Queue()

    def put(self, index: int, item: QueueItem) -> None:
        """Add an item of one text; called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))
        except RuntimeError:  # the loop is closed, and with it the connection
            return

    async def stream_outputs(
        self, generations: Sequence[Generation], request: Request, deadline: float
    ) -> OutputStream:
        """Yield the pieces of all texts as they come.

        Raises MemtxError if a text cannot be generated, the deadline has passed, or the client has disconnected.
        """
        num_open, last_poll = len(generations), time.monotonic()
        try:
            while num_open:
                seconds = min(DISCONNECT_POLL_SECONDS, remaining_seconds(deadline) or DISCONNECT_POLL_SECONDS)
                try:
                    index, item = await asyncio.wait_for(self._queue.get(), seconds)
                except TimeoutError:
                    index, item = 0, TextDelta()
                if time.monotonic() - last_poll > DISCONNECT_POLL_SECONDS:
                    last_poll = time.monotonic()
                    if await request.is_disconnected():
                        raise APIError(499, "The client has disconnected.")
                if item is None:
                    num_open -= 1
                elif isinstance(item, BaseException):
                    raise item
                elif item.text or item.token_logprobs:
                    yield index, item
        finally:
            for generation in generations:
                generation.cancel()


async def iterate_in_threadpool(iterator: Iterator[TextDelta], first: TextDelta | None) -> OutputStream:
    """Yield ``(0, piece)`` for ``first`` and the pieces of a blocking iterator, which is closed at the end."""
    try:
        delta = first
        while delta is not None:
            yield 0, delta
            delta = await to_thread.run_sync(next, iterator, None)
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(iterator.close)  # type: ignore[attr-defined]


def format_sse(data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def stream_sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield chunks as server-sent events; an error becomes the last event."""
    try:
        async for chunk in chunks:
            yield format_sse(chunk)
    except Exception as error:  # the status has been sent, so only the stream can carry the error
        yield format_sse(error_body(to_api_error(error)))
        return
    yield "data: [DONE]\n\n"
