"""``/v1/sessions``: texts that are read piece by piece, scored against, gone on with, forked, and taken elsewhere."""

from __future__ import annotations

import math
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from memtx.inference.continuation import Continuation
from memtx.inference.engine import Generation
from memtx.inference.pool import SessionPool
from memtx.inference.reader import SegmentResult
from memtx.serving.completions import Completions, Prompt
from memtx.serving.limits import deadline_of
from memtx.serving.problems import Problem
from memtx.serving.replies import Answer
from memtx.serving.schemas import ContinueBody, CreateBody, FeedBody, ScoreBody
from memtx.serving.streams import in_thread

BINARY = "application/octet-stream"


def described(pool: SessionPool, name: str) -> dict[str, Any]:
    """Return what is known of a session."""
    info = pool.info(name)
    totals = info.totals
    return {
        "id": info.name,
        "object": "session",
        "created": int(info.created),
        "tokens": totals.tokens,
        "bytes": totals.bytes,
        "words": totals.words,
        "nll": totals.nll,
        # Of the text that was scored; None before there is any.
        "bits_per_byte": totals.bits_per_byte if totals.tokens and totals.bytes else None,
        "state_bytes": pool.session_bytes,
        "resident": info.resident,
        "saved": info.saved,
    }


def segment(result: SegmentResult) -> dict[str, Any]:
    """Return a segment's result; ``bytes`` says how many of the text's bytes each token is."""
    said: dict[str, Any] = {
        "start": result.start,
        "tokens": result.tokens.tolist(),
        "nll": [round(float(value), 6) for value in result.nll],
        "bytes": [len(part) for part in result.token_bytes],
    }
    if result.top_tokens is not None and result.top_logprobs is not None:
        said["top_tokens"] = result.top_tokens.tolist()
        said["top_logprobs"] = result.top_logprobs.tolist()
    if result.embeddings is not None:
        said["embeddings"] = result.embeddings.tolist()
    return said


def router(pool: SessionPool, completions: Completions) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/v1/sessions")

    @routes.post("", status_code=201)
    def create(body: CreateBody, request: Request) -> dict[str, Any]:
        """Begin a session, with the beginning of its text if there is one."""
        name = pool.create()
        try:
            results = pool.feed(name, body.text, save=body.save, deadline=deadline_of(request))
        except BaseException:
            pool.delete(name)
            raise
        return described(pool, name) | {"segments": [segment(one) for one in results]}

    @routes.get("")
    def sessions() -> dict[str, Any]:
        """List all sessions, the one unused for longest first."""
        return {"object": "list", "data": [described(pool, name) for name in pool.names()]}

    # Before the routes with a name, of which it would be one.
    @routes.post("/import", status_code=201)
    async def take_in(request: Request) -> dict[str, Any]:
        """Begin a session from an exported file, which is the body."""
        content = await request.body()
        name = await to_thread.run_sync(pool.take_in, content)
        return described(pool, name)

    @routes.get("/{name}")
    def look(name: str) -> dict[str, Any]:
        """Say where a session stands."""
        return described(pool, name)

    @routes.delete("/{name}", status_code=204)
    def delete(name: str, request: Request) -> Response:
        """Remove a session and its file."""
        pool.delete(name, deadline=deadline_of(request))
        return Response(status_code=204)

    @routes.post("/{name}/feed")
    def feed(name: str, body: FeedBody, request: Request) -> dict[str, Any]:
        """Read more of the text: all of it or nothing. What is no whole piece yet waits for the rest or ``end``."""
        results = pool.feed(name, body.text, end=body.end, save=body.save, deadline=deadline_of(request))
        return described(pool, name) | {"segments": [segment(one) for one in results]}

    @routes.post("/{name}/score")
    def score(name: str, body: ScoreBody, request: Request) -> dict[str, Any]:
        """Score a text that would go on; the session stays as it is. What waits in it is scored before the text."""
        before, results = pool.score(
            name, body.text, top=body.top, embeddings=body.embeddings, deadline=deadline_of(request)
        )
        scored = sum(float(one.nll.sum(dtype="float64")) for one in results)
        count = sum(len(one.tokens) for one in results)
        size = sum(map(len, (part for one in results for part in one.token_bytes)))
        return {
            "object": "score",
            "from_token": before.tokens,
            "tokens": count,
            "bytes": size,
            "nll": scored,
            "bits_per_byte": scored / math.log(2) / size if size else None,
            "segments": [segment(one) for one in results],
        }

    @routes.post("/{name}/generate")
    async def generate(name: str, body: ContinueBody, request: Request) -> Response:
        """Go on with a session: the answer of ``/v1/completions``."""
        seeds = completions.check(body)
        requests = body.requests(seeds)
        deadline = deadline_of(request)
        if not body.keep:
            if body.save:
                raise Problem(400, "save without keep: there is nothing new to save.", "Leave it out.", param="save")
            reader = await to_thread.run_sync(lambda: pool.branch(name, deadline=deadline))
            prompt = await to_thread.run_sync(lambda: completions.read(reader, body.prompt, echo=False, goes_on=True))
            return await completions.answer(request, body, [prompt], seeds)
        if len(requests) != 1:
            raise Problem(400, "keep with n above 1: only one text can be kept.", "Ask for one.", param="n")
        made: list[Generation] = []
        pieces = pool.write(name, body.prompt, requests[0], save=body.save, deadline=deadline, listen=made.append)
        # The first piece is waited for here, so that what is wrong with the request has a status.
        first = await to_thread.run_sync(next, pieces, None)
        text = made[0].text if made else Continuation(pool.tokenizer, 0, [], requests[0])
        prompt = Prompt("", [], 0, pool.reader(), [])
        answer = Answer(completions.name, pool.tokenizer, body.logprobs is not None)
        return await completions.respond(body, answer, [prompt], [text], in_thread(pieces, first))

    @routes.post("/{name}/fork", status_code=201)
    def fork(name: str, request: Request) -> dict[str, Any]:
        """Begin a session that goes on where this one stands."""
        return described(pool, pool.fork(name, deadline=deadline_of(request)))

    @routes.post("/{name}/save")
    def save(name: str, request: Request) -> dict[str, Any]:
        """Write a session to disk: once this is answered, it survives the end of the process."""
        pool.save(name, deadline=deadline_of(request))
        return described(pool, name)

    @routes.get("/{name}/export", response_class=Response, responses={200: {"content": {BINARY: {}}}})
    def export(name: str, request: Request) -> Response:
        """Return a session as one safetensors file."""
        content = pool.export(name, deadline=deadline_of(request))
        headers = {"Content-Disposition": 'attachment; filename="memtx.session"'}
        return Response(content, media_type=BINARY, headers=headers)

    return routes
