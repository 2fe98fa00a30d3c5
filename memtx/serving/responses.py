"""Responses in the format of OpenAI completions, whole or streamed as server-sent events."""

from __future__ import annotations

import asyncio
import codecs
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anyio import CancelScope, to_thread
from fastapi import Request

from memtx.data.token_decoder import count_broken_chars
from memtx.data.tokenizers import Tokenizer
from memtx.inference.deadline import remaining_seconds
from memtx.inference.engine import Generation, QueueItem
from memtx.inference.generate import TextDelta, TokenLogprob
from memtx.inference.reader import SegmentResult
from memtx.serving.errors import APIError, error_body, to_api_error

DISCONNECT_POLL_SECONDS = 0.5

_LINE_SEPARATORS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}

Logprobs = Iterable[TokenLogprob]
OutputStream = AsyncIterator[tuple[int, TextDelta]]
"""Pairs of a text's index and its next piece."""


def format_token(content: bytes) -> str:
    """Return the text of a token, with incomplete characters as escaped bytes in OpenAI's notation."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def name_top_tokens(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """Return the log-probabilities of the most likely tokens and of the token itself, by their texts.

    The token itself has its own text as key, and of others with one text the most likely; the rest are named by id.
    """
    if entry.logprob is None:
        return {}
    named = {format_token(entry.content): entry.logprob}
    for token, logprob in entry.top_logprobs:
        if token != entry.token:
            text = format_token(tokenizer.token_bytes(token))
            named[f"token_id:{token}" if text in named else text] = logprob
    return named


def get_prompt_logprobs(
    results: Iterable[SegmentResult], prompt: str | Sequence[int], tokenizer: Tokenizer, deadline: float
) -> list[TokenLogprob]:
    """Return the log-probabilities of the tokens of a prompt, None for unscored ones; raises DeadlineExceededError."""
    bos_token_id, offset = tokenizer.bos_token_id, 0
    is_first_begin = not isinstance(prompt, str) and prompt[:1] == [bos_token_id]
    logprobs = [TokenLogprob(bos_token_id, None, (), 0)] if is_first_begin and bos_token_id is not None else []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for result in results:
        remaining_seconds(deadline)
        for index, token in enumerate(result.tokens.tolist()):
            top: tuple[tuple[int, float], ...] = ()
            # Nothing predicts a begin token, or the first one of a text without it.
            is_unscored = token == bos_token_id or (bos_token_id is None and result.start + index == 0)
            if not is_unscored and result.top_tokens is not None and result.top_logprobs is not None:
                top = tuple(zip(result.top_tokens[index].tolist(), result.top_logprobs[index].tolist(), strict=True))
            logprob = None if is_unscored else -float(result.nll[index])
            content = result.token_bytes[index]
            start = offset + count_broken_chars(decoder.getstate()[0], content)
            logprobs.append(TokenLogprob(token, logprob, top, start, content))
            offset += len(decoder.decode(content))
    return logprobs


@dataclass
class CompletionFormatter:
    """Formatter of the response to one request, whole or in chunks, with log-probabilities if they were requested.

    ``extra_fields`` are further fields of the response and of every chunk.
    """

    model: str
    tokenizer: Tokenizer
    include_logprobs: bool
    extra_fields: dict[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    id_prefix: ClassVar[str] = "cmpl"
    response_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def __post_init__(self) -> None:
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"

    def format_first(self, index: int) -> dict[str, Any] | None:
        """Return the choice of the chunk that begins a streamed text, if there is one."""
        return None

    def format_choice(
        self, index: int, text: str, logprobs: Logprobs = (), finish_reason: str | None = None, is_delta: bool = False
    ) -> dict[str, Any]:
        """Return one choice, or with ``is_delta`` the next part of a streamed one."""
        return {
            "index": index,
            "text": text,
            "logprobs": self._format_logprobs(list(logprobs)) if self.include_logprobs else None,
            "finish_reason": finish_reason,
        }

    def format_response(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return a response."""
        return {**self._describe(self.response_object), "choices": choices, "usage": usage}

    def format_chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a chunk of a streamed response."""
        return {**self._describe(self.chunk_object), "choices": choices, **({"usage": usage} if usage else {})}

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, **self.extra_fields}

    def _format_logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [format_token(entry.content) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [name_top_tokens(self.tokenizer, entry) or None for entry in logprobs],
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
    # Some clients split lines at Unicode's line separators too, which JSON does not escape.
    content = json.dumps(data, ensure_ascii=False).translate(_LINE_SEPARATORS)
    return f"data: {content}\n\n"


async def stream_sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield chunks as server-sent events; an error becomes the last event."""
    try:
        async for chunk in chunks:
            yield format_sse(chunk)
    except Exception as error:  # the status has been sent, so only the stream can carry the error
        yield format_sse(error_body(to_api_error(error)))
        return
    yield "data: [DONE]\n\n"
