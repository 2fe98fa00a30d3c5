"""``/v1/sessions``: texts that are read piece by piece, scored against, gone on with, forked, and taken elsewhere."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from memtx.inference.engine import Generation
from memtx.inference.generate import TokenGenerator
from memtx.inference.reader import SegmentResult, nats_to_bits_per_byte
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.completions import CompletionService, PrefilledPrompt
from memtx.serving.errors import APIError
from memtx.serving.limits import get_deadline
from memtx.serving.responses import CompletionFormatter
from memtx.serving.schemas import CreateBody, FeedBody, GenerateBody, ScoreBody
from memtx.serving.sse import iterate_in_threadpool

BINARY_MEDIA_TYPE = "application/octet-stream"


def describe_session(pool: SessionPool, session_id: str) -> dict[str, Any]:
    """Return what is known of a session."""
    info = pool.info(session_id)
    totals = info.totals
    return {
        "id": info.session_id,
        "object": "session",
        "created": int(info.created),
        "tokens": totals.num_tokens,
        "bytes": totals.num_bytes,
        "words": totals.num_words,
        "nll": totals.nll,
        # Of the text that was scored; None before there is any.
        "bits_per_byte": totals.bits_per_byte if totals.num_tokens and totals.num_bytes else None,
        "state_bytes": pool.session_bytes,
        "in_memory": info.in_memory,
        "saved": info.is_saved,
    }


def segment_to_dict(result: SegmentResult) -> dict[str, Any]:
    """Return a segment's result; ``byte_lengths`` says how many of the text's bytes each token is."""
    said: dict[str, Any] = {
        "start": result.start,
        "token_ids": result.tokens.tolist(),
        "nll": [round(float(value), 6) for value in result.nll],
        "byte_lengths": [len(part) for part in result.token_bytes],
    }
    if result.top_tokens is not None and result.top_logprobs is not None:
        said["top_token_ids"] = result.top_tokens.tolist()
        said["top_logprobs"] = result.top_logprobs.tolist()
    if result.hidden_states is not None:
        said["hidden_states"] = result.hidden_states.tolist()
    return said


def build_sessions_router(pool: SessionPool, service: CompletionService) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/v1/sessions")

    @routes.post("", status_code=201)
    def create(body: CreateBody, request: Request) -> dict[str, Any]:
        """Begin a session, with the beginning of its text if there is one."""
        name = pool.create()
        try:
            results = pool.feed(name, body.text, save=body.save, deadline=get_deadline(request))
        except BaseException:
            pool.delete(name)
            raise
        return describe_session(pool, name) | {"segments": [segment_to_dict(one) for one in results]}

    @routes.get("")
    def list_sessions() -> dict[str, Any]:
        """List all sessions, the one unused for longest first."""
        return {"object": "list", "data": [describe_session(pool, name) for name in pool.session_ids()]}

    # Before the routes with a name, of which it would be one.
    @routes.post("/import", status_code=201)
    async def import_session(request: Request) -> dict[str, Any]:
        """Begin a session from an exported file, which is the body."""
        content = await request.body()
        name = await to_thread.run_sync(pool.import_session, content)
        return describe_session(pool, name)

    @routes.get("/{session_id}")
    def get_session(session_id: str) -> dict[str, Any]:
        """Say where a session stands."""
        return describe_session(pool, session_id)

    @routes.delete("/{session_id}", status_code=204)
    def delete(session_id: str, request: Request) -> Response:
        """Remove a session and its file."""
        pool.delete(session_id, deadline=get_deadline(request))
        return Response(status_code=204)

    @routes.post("/{session_id}/feed")
    def feed(session_id: str, body: FeedBody, request: Request) -> dict[str, Any]:
        """Read more of the text: all of it or nothing.

        What is no whole piece yet waits for the rest or ``end_of_text``.
        """
        results = pool.feed(
            session_id, body.text, end_of_text=body.end_of_text, save=body.save, deadline=get_deadline(request)
        )
        return describe_session(pool, session_id) | {"segments": [segment_to_dict(one) for one in results]}

    @routes.post("/{session_id}/score")
    def score(session_id: str, body: ScoreBody, request: Request) -> dict[str, Any]:
        """Score a text that would go on; the session stays as it is. What waits in it is scored before the text."""
        before, results = pool.score(
            session_id,
            body.text,
            num_logprobs=body.logprobs,
            return_hidden_states=body.return_hidden_states,
            deadline=get_deadline(request),
        )
        scored = sum(float(one.nll.sum(dtype="float64")) for one in results)
        count = sum(len(one.tokens) for one in results)
        size = sum(map(len, (part for one in results for part in one.token_bytes)))
        return {
            "object": "score",
            "start": before.num_tokens,
            "tokens": count,
            "bytes": size,
            "nll": scored,
            "bits_per_byte": nats_to_bits_per_byte(scored, size) if size else None,
            "segments": [segment_to_dict(one) for one in results],
        }

    @routes.post("/{session_id}/generate")
    async def generate(session_id: str, body: GenerateBody, request: Request) -> Response:
        """Go on with a session: the answer of ``/v1/completions``."""
        seeds = service.resolve_seeds(body)
        requests = body.to_generation_configs(seeds)
        deadline = get_deadline(request)
        if not body.update_session:
            if body.save:
                raise APIError(
                    400, "save without update_session: there is nothing new to save.", "Leave it out.", param="save"
                )
            reader = await to_thread.run_sync(lambda: pool.fork_reader(session_id, deadline=deadline))
            prompt = await to_thread.run_sync(
                lambda: service.prefill(reader, body.prompt, echo=False, will_generate=True)
            )
            return await service.generate(request, body, [prompt], seeds)
        if len(requests) != 1:
            raise APIError(400, "update_session with n above 1: only one text can be kept.", "Ask for one.", param="n")
        made: list[Generation] = []
        pieces = pool.generate_and_append(
            session_id, body.prompt, requests[0], save=body.save, deadline=deadline, on_start=made.append
        )
        # The first piece is waited for here, so that what is wrong with the request has a status.
        first = await to_thread.run_sync(next, pieces, None)
        text = made[0].token_generator if made else TokenGenerator(pool.tokenizer, 0, [], requests[0])
        prompt = PrefilledPrompt("", [], 0, pool.new_reader(), [])
        answer = CompletionFormatter(service.model_name, pool.tokenizer, body.logprobs is not None)
        return await service.respond(body, answer, [prompt], [text], iterate_in_threadpool(pieces, first))

    @routes.post("/{session_id}/fork", status_code=201)
    def fork(session_id: str, request: Request) -> dict[str, Any]:
        """Begin a session that goes on where this one stands."""
        return describe_session(pool, pool.fork(session_id, deadline=get_deadline(request)))

    @routes.post("/{session_id}/save")
    def save(session_id: str, request: Request) -> dict[str, Any]:
        """Write a session to disk: once this is answered, it survives the end of the process."""
        pool.save(session_id, deadline=get_deadline(request))
        return describe_session(pool, session_id)

    @routes.get("/{session_id}/export", response_class=Response, responses={200: {"content": {BINARY_MEDIA_TYPE: {}}}})
    def export(session_id: str, request: Request) -> Response:
        """Return a session as one safetensors file."""
        content = pool.export_session(session_id, deadline=get_deadline(request))
        headers = {"Content-Disposition": 'attachment; filename="memtx.session"'}
        return Response(content, media_type=BINARY_MEDIA_TYPE, headers=headers)

    return routes
