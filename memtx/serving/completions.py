"""``/v1/completions``, as OpenAI's clients use it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memtx.inference.continuation import Chosen, Continuation, Piece
from memtx.inference.generate import newest_tokens
from memtx.inference.pool import SessionPool
from memtx.inference.reader import StreamReader
from memtx.serving.limits import Limits, deadline_of
from memtx.serving.metrics import PoolMetrics
from memtx.serving.names import check_model
from memtx.serving.problems import Problem
from memtx.serving.replies import Answer, Made, chosen_in, usage_of
from memtx.serving.schemas import CompletionBody, Making
from memtx.serving.streams import Inbox, Pieces, events

AT_ONCE = 16
"""Prompts of one request that are read at the same time."""


@dataclass(frozen=True)
class Prompt:
    """A prompt that was read.

    Attributes:
        text: as it is echoed.
        tokens: likewise, where log-probabilities are shown.
        count: of its tokens.
        reader: stands at its end.
        recent: its newest tokens.
    """

    text: str
    tokens: list[Chosen]
    count: int
    reader: StreamReader
    recent: list[int]


class Completions:
    """Makes texts for requests.

    Args:
        pool: reads and makes.
        name: of the model.
        limits: to be kept.
        metrics: counts tokens.
    """

    def __init__(self, pool: SessionPool, name: str, limits: Limits, metrics: PoolMetrics) -> None:
        self.pool = pool
        self.name = name
        self.limits = limits
        self.metrics = metrics

    def check(self, body: Making, prompts: int = 1) -> list[int]:
        """Return the seeds of the texts that are asked for, prompt by prompt.

        Raises:
            Problem: more is asked for than one request may.
        """
        tokens, choices = body.max_tokens or 0, (body.n or 1) * prompts
        for name, asked, most in (
            ("max_tokens", tokens, self.limits.tokens),
            ("n", choices, self.limits.choices),
        ):
            if asked > most:
                raise Problem(400, f"{name} makes {asked}, at most {most} may be.", "Ask for less.", param=name)
        seed = body.seed if body.seed is not None else secrets.randbits(48)
        # Each text has a seed of its own that its place decides: the same request gives the same texts.
        return [(seed + place) % 2**63 for place in range(choices)]

    def read(self, reader: StreamReader, prompt: str | list[int], *, echo: bool, goes_on: bool) -> Prompt:
        """Read a prompt; blocks."""
        fed = reader.feed(prompt) if isinstance(prompt, str) else reader.feed_tokens(prompt)
        results = list(chain(fed, reader.finish(last=not goes_on)))
        text = prompt if isinstance(prompt, str) else self.pool.tokenizer.decode(prompt)
        count = sum(len(result.tokens) for result in results)
        return Prompt(text if echo else "", chosen_in(results) if echo else [], count, reader, newest_tokens(results))

    async def answer(self, request: Request, body: Making, prompts: list[Prompt], seeds: list[int]) -> Response:
        """Make the texts and answer, whole or as a stream."""
        answer = Answer(self.name, self.pool.tokenizer, body.logprobs is not None)
        inbox, deadline = Inbox(), deadline_of(request)
        requests, n = body.requests(seeds), body.n or 1
        generations = []
        for place, prompt in enumerate(prompts):
            part = range(place * n, (place + 1) * n)
            generations += self.pool.go_on(
                prompt.reader,
                prompt.recent,
                [requests[index] for index in part],
                deadline=deadline,
                arrivals=[inbox.place(index) for index in part],
            )
        pieces = inbox.pieces(generations, request, deadline)
        texts = [generation.text for generation in generations]
        return await self.respond(body, answer, [prompts[index // n] for index in range(len(texts))], texts, pieces)

    async def respond(
        self, body: Making, answer: Answer, prompts: list[Prompt], texts: list[Continuation], pieces: Pieces
    ) -> Response:
        """Answer with pieces as they come, or with all of them at the end; one prompt and one text a choice."""
        if body.stream:
            chunks = self._chunks(body, answer, prompts, texts, pieces)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events(chunks), media_type="text/event-stream", headers=headers)
        made = [Made(prompt.text, list(prompt.tokens)) for prompt in prompts]
        async for index, piece in pieces:
            made[index].add(_moved(piece, len(prompts[index].text)))
        choices = [answer.choice(index, one.text, one.tokens, texts[index].finish) for index, one in enumerate(made)]
        return JSONResponse(answer.whole(choices, self._usage(prompts, texts)))

    async def _chunks(
        self, body: Making, answer: Answer, prompts: list[Prompt], texts: list[Continuation], pieces: Pieces
    ) -> AsyncIterator[dict[str, Any]]:
        for index, prompt in enumerate(prompts):
            if prompt.text:
                yield answer.whole([answer.choice(index, prompt.text, prompt.tokens, None)], None)
        async for index, piece in pieces:
            moved = _moved(piece, len(prompts[index].text))
            yield answer.whole([answer.choice(index, moved.text, moved.tokens, None)], None)
        for index, text in enumerate(texts):
            yield answer.whole([answer.choice(index, "", [], text.finish)], None)
        usage = self._usage(prompts, texts)
        if body.usage:
            yield answer.whole([], usage)

    def _usage(self, prompts: list[Prompt], texts: list[Continuation]) -> dict[str, int]:
        made = sum(text.made for text in texts)
        self.metrics.made.inc(made)
        return usage_of(sum(prompt.count for prompt in {id(one): one for one in prompts}.values()), made)


def _moved(piece: Piece, before: int) -> Piece:
    """Return a piece whose tokens' offsets count the echoed prompt as well."""
    return Piece(piece.text, tuple(replace(one, offset=one.offset + before) for one in piece.tokens))


def router(completions: Completions) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def complete(body: CompletionBody, request: Request) -> Response:
        """Go on with one or more prompts; ``echo`` with ``max_tokens`` 0 scores them."""
        check_model(body.model, completions.name)
        prompts = body.prompts()
        if not prompts:
            raise Problem(400, "The prompt is an empty list.", "Give a text or tokens.", param="prompt")
        seeds = completions.check(body, len(prompts))
        body.requests(seeds[:1])  # What is wrong with numbers is said before anything is read.
        echo, top = bool(body.echo), body.logprobs or 0
        # Without log-probabilities the text is all that is echoed, and needs no likely tokens.
        wanted = top if echo else 0

        def one(prompt: str | list[int]) -> Prompt:
            reader = completions.pool.reader(top=wanted, deadline=deadline_of(request))
            return completions.read(reader, prompt, echo=echo, goes_on=body.max_tokens != 0)

        def read() -> list[Prompt]:
            if len(prompts) == 1:
                return [one(prompts[0])]
            with ThreadPoolExecutor(min(len(prompts), AT_ONCE)) as threads:
                return list(threads.map(one, prompts))

        return await completions.answer(request, body, await to_thread.run_sync(read), seeds)

    return routes
