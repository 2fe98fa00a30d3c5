"""Texts that are being made, seen from the event loop: pieces of several, as they come; and server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from anyio import CancelScope, to_thread
from fastapi import Request

from memtx.inference.continuation import Piece
from memtx.inference.engine import Arrival, Generation, seconds_left
from memtx.serving.problems import Problem, body_of, problem_of

LOOK = 0.5
"""Seconds between two looks whether the client still listens."""

Pieces = AsyncIterator[tuple[int, Piece]]


class Inbox:
    """Where the engine's thread puts the pieces of several texts for one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Arrival]] = asyncio.Queue()

    def place(self, index: int) -> Place:
        """Return what takes the pieces of one text."""
        return Place(self, index)

    def put(self, index: int, item: Arrival) -> None:
        """Take a piece; called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, item))
        except RuntimeError:  # The loop is closed: nobody listens any more.
            return

    async def pieces(self, generations: Sequence[Generation], request: Request, deadline: float) -> Pieces:
        """Yield (which text, piece) until all have ended.

        Raises:
            OutOfTimeError: the deadline passed.
            MemtxError: a text could not be made.
            Problem: nobody listens any more.
        """
        left, looked = len(generations), time.monotonic()
        try:
            while left:
                remaining = seconds_left(deadline)
                try:
                    index, item = await asyncio.wait_for(self._queue.get(), min(LOOK, remaining or LOOK))
                except TimeoutError:
                    item = Piece()
                    index = 0
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise Problem(499, "The client is gone.")
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                elif item.text or item.tokens:
                    yield index, item
        finally:
            for generation in generations:
                generation.cancel()


class Place:
    """One text's entrance to an inbox."""

    def __init__(self, inbox: Inbox, index: int) -> None:
        self._inbox = inbox
        self._index = index

    def put(self, item: Arrival) -> None:
        """Take a piece, an error or the end."""
        self._inbox.put(self._index, item)


async def in_thread(pieces: Iterator[Piece], first: Piece | None) -> Pieces:
    """Yield (0, piece): the first, then those of an iterator that blocks; it is closed whatever happens."""
    try:
        if first is not None:
            yield 0, first
        while (piece := await to_thread.run_sync(next, pieces, None)) is not None:
            yield 0, piece
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(pieces.close)  # type: ignore[attr-defined]


def event(content: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield chunks as server-sent events; an error is the last of them."""
    try:
        async for chunk in chunks:
            yield event(chunk)
    except Exception as error:  # The status was sent long ago: what is wrong can only be said in the stream.
        yield event(body_of(problem_of(error)))
        return
    yield "data: [DONE]\n\n"
