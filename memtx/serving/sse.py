"""Texts that are being made, seen from the event loop: pieces of several, as they come; and server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from anyio import CancelScope, to_thread
from fastapi import Request

from memtx.inference.deadline import remaining_seconds
from memtx.inference.engine import Generation, QueueItem
from memtx.inference.generate import TextDelta
from memtx.serving.errors import APIError, error_body, to_api_error

DISCONNECT_POLL_SECONDS = 0.5
"""Seconds between two looks whether the client still listens."""

OutputStream = AsyncIterator[tuple[int, TextDelta]]


class TokenQueue:
    """Where the engine's thread puts the pieces of several texts for one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, QueueItem]] = asyncio.Queue()

    def put(self, index: int, item: QueueItem) -> None:
        """Take a piece; called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))
        except RuntimeError:  # The loop is closed: nobody listens any more.
            return

    async def stream_outputs(
        self, generations: Sequence[Generation], request: Request, deadline: float
    ) -> OutputStream:
        """Yield (which text, piece) until all have ended.

        Raises:
            DeadlineExceededError: the deadline passed.
            MemtxError: a text could not be made.
            APIError: nobody listens any more.
        """
        left, looked = len(generations), time.monotonic()
        try:
            while left:
                remaining = remaining_seconds(deadline)
                try:
                    index, item = await asyncio.wait_for(
                        self._queue.get(), min(DISCONNECT_POLL_SECONDS, remaining or DISCONNECT_POLL_SECONDS)
                    )
                except TimeoutError:
                    item = TextDelta()
                    index = 0
                if time.monotonic() - looked > DISCONNECT_POLL_SECONDS:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise APIError(499, "The client is gone.")
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                elif item.text or item.token_logprobs:
                    yield index, item
        finally:
            for generation in generations:
                generation.cancel()


async def iterate_in_threadpool(iterator: Iterator[TextDelta], first: TextDelta | None) -> OutputStream:
    """Yield (0, piece): the first, then those of an iterator that blocks; it is closed whatever happens."""
    try:
        if first is not None:
            yield 0, first
        while (piece := await to_thread.run_sync(next, iterator, None)) is not None:
            yield 0, piece
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(iterator.close)  # type: ignore[attr-defined]


def format_sse(data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def stream_sse(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield chunks as server-sent events; an error is the last of them."""
    try:
        async for chunk in chunks:
            yield format_sse(chunk)
    except Exception as error:  # The status was sent long ago: what is wrong can only be said in the stream.
        yield format_sse(error_body(to_api_error(error)))
        return
    yield "data: [DONE]\n\n"
