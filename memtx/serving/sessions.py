"""``/v1/sessions``: texts that are read piece by piece, scored, continued, forked, saved and exported."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from memtx.inference.engine import Generation
from memtx.inference.generate import TokenGenerator
from memtx.inference.reader import SegmentResult, nats_to_bits_per_byte
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.completions import Choice, Service, get_service
from memtx.serving.errors import APIError
from memtx.serving.limits import Deadline
from memtx.serving.responses import iterate_in_threadpool
from memtx.serving.schemas import CreateBody, FeedBody, GenerateBody, ScoreBody

BINARY_MEDIA_TYPE = "application/octet-stream"


async def get_pool(request: Request) -> SessionPool:
    """Return the pool of the application."""
    return (await get_service(request)).pool


Pool = Annotated[SessionPool, Depends(get_pool)]
router = APIRouter(prefix="/v1/sessions")


def describe_session(pool: SessionPool, session_id: str) -> dict[str, Any]:
    """Return the JSON of a session; ``bits_per_byte`` is None before any text was scored."""
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
        "bits_per_byte": totals.bits_per_byte if totals.num_tokens and totals.num_bytes else None,
        "state_bytes": pool.session_bytes,
        "in_memory": info.in_memory,
        "saved": info.is_saved,
        "turns": info.num_turns,
    }


def segment_to_dict(result: SegmentResult) -> dict[str, Any]:
    """Return the JSON of a segment; ``byte_lengths`` are the bytes of text per token."""
    fields: dict[str, Any] = {
        "start": result.start,
        "token_ids": result.tokens.tolist(),
        "nll": [round(float(nll), 6) for nll in result.nll],
        "byte_lengths": [len(content) for content in result.token_bytes],
    }
    if result.top_tokens is not None and result.top_logprobs is not None:
        fields["top_token_ids"] = result.top_tokens.tolist()
        fields["top_logprobs"] = result.top_logprobs.tolist()
    if result.hidden_states is not None:
        fields["hidden_states"] = result.hidden_states.tolist()
    return fields


@router.post("", status_code=201)
def create(body: CreateBody, pool: Pool, deadline: Deadline) -> dict[str, Any]:
    """Create a session and read the start of its text, if given."""
    session_id = pool.create()
    try:
        options: dict[str, Any] = {"parse_special": body.parse_special, "save": body.save, "deadline": deadline}
        results = pool.feed(session_id, body.text, **options)
    except BaseException:
        pool.delete(session_id)
        raise
    return describe_session(pool, session_id) | {"segments": [segment_to_dict(result) for result in results]}


@router.get("")
def list_sessions(pool: Pool) -> dict[str, Any]:
    """List all sessions, least recently used first."""
    return {"object": "list", "data": [describe_session(pool, session_id) for session_id in pool.session_ids()]}


# Before the routes with a session id, which would match it.
@router.post("/import", status_code=201)
async def import_session(request: Request, pool: Pool) -> dict[str, Any]:
    """Create a session from an exported file, sent as the body."""
    content = await request.body()
    return describe_session(pool, await to_thread.run_sync(pool.import_session, content))


@router.get("/{session_id}")
def get_session(session_id: str, pool: Pool) -> dict[str, Any]:
    """Describe a session."""
    return describe_session(pool, session_id)


@router.delete("/{session_id}", status_code=204)
def delete(session_id: str, pool: Pool, deadline: Deadline) -> Response:
    """Delete a session and its file."""
    pool.delete(session_id, deadline=deadline)
    return Response(status_code=204)


@router.post("/{session_id}/feed")
def feed(session_id: str, body: FeedBody, pool: Pool, deadline: Deadline) -> dict[str, Any]:
    """Read more text, all or nothing; a remainder shorter than a segment waits for more text or ``end_of_text``."""
    options: dict[str, Any] = {"parse_special": body.parse_special, "save": body.save, "deadline": deadline}
    results = pool.feed(session_id, body.text, end_of_text=body.end_of_text, **options)
    return describe_session(pool, session_id) | {"segments": [segment_to_dict(result) for result in results]}


@router.post("/{session_id}/score")
def score(session_id: str, body: ScoreBody, pool: Pool, deadline: Deadline) -> dict[str, Any]:
    """Score a continuation without changing the session; text that waits in it is scored first."""
    settings: dict[str, Any] = {"num_logprobs": body.logprobs, "return_hidden_states": body.return_hidden_states}
    settings["parse_special"] = body.parse_special
    totals, results = pool.score(session_id, body.text, deadline=deadline, **settings)
    nll = sum(float(result.nll.sum(dtype="float64")) for result in results)
    num_bytes = sum(len(content) for result in results for content in result.token_bytes)
    return {
        "object": "score",
        "start": totals.num_tokens,
        "tokens": sum(len(result.tokens) for result in results),
        "bytes": num_bytes,
        "nll": nll,
        "bits_per_byte": nats_to_bits_per_byte(nll, num_bytes) if num_bytes else None,
        "segments": [segment_to_dict(result) for result in results],
    }


@router.post("/{session_id}/generate")
async def generate(
    session_id: str, body: GenerateBody, request: Request, service: Service, deadline: Deadline
) -> Response:
    """Continue a session, with the response of ``/v1/completions``."""
    pool, configs = service.pool, service.build_configs(body)
    if not body.update_session:
        if body.save:
            hint = "Remove save, or set update_session."
            raise APIError(400, "save has no effect without update_session.", hint, param="save")
        fork = partial(pool.fork_reader, session_id, parse_special=body.parse_special, deadline=deadline)
        reader = await to_thread.run_sync(fork)
        namespace = request.headers.get("authorization", "")
        prefill = partial(service.prefill, reader, body.prompt, body, deadline, namespace=namespace)
        prompt = await to_thread.run_sync(prefill)
        return await service.generate(request, body, [prompt], configs, deadline)
    if len(configs) != 1:
        raise APIError(400, f"update_session takes one text, but n is {len(configs)}.", "Set n to 1.", param="n")
    started: list[Generation] = []
    options: dict[str, Any] = {"parse_special": body.parse_special, "save": body.save, "deadline": deadline}
    deltas = pool.generate_and_append(session_id, body.prompt, configs[0], on_start=started.append, **options)
    # Awaited here, so that an error of the request gets a status code of its own.
    first = await to_thread.run_sync(next, deltas, None)
    generator = started[0].token_generator if started else TokenGenerator(pool.tokenizer, 0, [], configs[0])
    return await service.respond(body, [Choice(generator)], iterate_in_threadpool(deltas, first), 0)


@router.post("/{session_id}/fork", status_code=201)
def fork(session_id: str, pool: Pool, deadline: Deadline) -> dict[str, Any]:
    """Create a session that continues from the state of this one."""
    return describe_session(pool, pool.fork(session_id, deadline=deadline))


@router.post("/{session_id}/save")
def save(session_id: str, pool: Pool, deadline: Deadline) -> dict[str, Any]:
    """Write a session to disk, so that it survives the end of the process."""
    pool.save(session_id, deadline=deadline)
    return describe_session(pool, session_id)


@router.get("/{session_id}/export", response_class=Response, responses={200: {"content": {BINARY_MEDIA_TYPE: {}}}})
def export(session_id: str, pool: Pool, deadline: Deadline) -> Response:
    """Return a session as one safetensors file."""
    content = pool.export_session(session_id, deadline=deadline)
    headers = {"Content-Disposition": 'attachment; filename="memtx.session"'}
    return Response(content, media_type=BINARY_MEDIA_TYPE, headers=headers)
