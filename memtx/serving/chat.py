"""``/v1/chat/completions``, compatible with OpenAI clients, and conversations that are sessions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from memtx.errors import MemtxError
from memtx.inference.engine import Generation
from memtx.inference.generate import TokenGenerator, TokenLogprob
from memtx.serving.chat_schemas import ChatBody
from memtx.serving.completions import Choice, CompletionService, PrefilledPrompt, Service
from memtx.serving.errors import APIError, check_model
from memtx.serving.limits import Deadline
from memtx.serving.responses import CompletionFormatter, Logprobs, format_token, iterate_in_threadpool

NEW_SESSION = "new"  # value of ``session`` that begins a conversation and creates its session
router = APIRouter()


class ChatFormatter(CompletionFormatter):
    """Formatter of chat completions."""

    id_prefix: ClassVar[str] = "chatcmpl"
    response_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def format_choice(
        self, index: int, text: str, logprobs: Logprobs = (), finish_reason: str | None = None, is_delta: bool = False
    ) -> dict[str, Any]:
        """Return one choice with its message, or with the next part of it."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if is_delta:
            message = {"content": text} if finish_reason is None else {}
        entries = [self._format_entry(entry) for entry in logprobs] if self.include_logprobs else []
        content = {"content": entries, "refusal": None} if entries or (self.include_logprobs and not is_delta) else None
        key = "delta" if is_delta else "message"
        return {"index": index, key: message, "logprobs": content, "finish_reason": finish_reason}

    def format_first(self, index: int) -> dict[str, Any] | None:
        """Return the choice that names the role."""
        return self.format_choice(index, "", is_delta=True) | {"delta": {"role": "assistant", "content": ""}}

    def _format_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [_format_token(self.tokenizer.token_bytes(token), logprob) for token, logprob in entry.top_logprobs]
        return _format_token(entry.content, entry.logprob or 0.0) | {"top_logprobs": top}


def _format_token(content: bytes, logprob: float) -> dict[str, Any]:
    return {"token": format_token(content), "logprob": logprob, "bytes": list(content)}


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request, service: Service, deadline: Deadline) -> Response:
    """Answer a conversation; with ``session``, the messages go on from those that the session has read."""
    check_model(body.model, service.model_name)
    body = body.with_max_tokens(service.limits.max_tokens)
    formatter = ChatFormatter(service.model_name, service.pool.tokenizer, body.num_logprobs is not None)
    if body.session is not None:
        return await _continue_session(body, service, formatter, deadline)
    configs, namespace = service.build_configs(body), request.headers.get("authorization", "")

    def prefill() -> PrefilledPrompt:
        reader = service.pool.new_reader(deadline=deadline)
        reader.splits_documents = False
        prompt = _encode(body, service, continues=False)
        reader.begin_with(prompt)
        # A completion of the same tokens would begin a document at each of them.
        has_begin_tokens = service.pool.tokenizer.bos_token_id in prompt[1:]
        key = f"{namespace} chat" if has_begin_tokens else namespace
        return service.prefill(reader, prompt, body, deadline, namespace=key)

    prompt = await to_thread.run_sync(prefill)
    return await service.generate(request, body, [prompt], configs, deadline, formatter)


async def _continue_session(
    body: ChatBody, service: CompletionService, formatter: ChatFormatter, deadline: float
) -> Response:
    """Answer in a session, which then holds the messages and the answer, all or nothing."""
    pool, (config,) = service.pool, service.build_configs(body)
    is_new = body.session == NEW_SESSION
    session_id = await to_thread.run_sync(pool.create) if is_new else str(body.session)
    started, prompt, num_read = list[Generation](), list[int](), 0

    def encode(num_turns: int, num_tokens: int) -> list[int]:
        nonlocal num_read
        prompt[:], num_read = _encode(body, service, continues=num_turns > 0), num_tokens
        return list(prompt)

    try:
        # The answer is appended by its ids, which come with log-probabilities.
        config = replace(config, logprobs=config.logprobs or 0)
        options: dict[str, Any] = {"save": body.save, "deadline": deadline, "on_start": started.append}
        deltas = pool.generate_and_append(session_id, encode, config, **options)
        # Awaited here, so that an error of the request gets a status code of its own.
        first = await to_thread.run_sync(next, deltas, None)
    except BaseException:
        if is_new:
            await to_thread.run_sync(pool.delete, session_id)
        raise
    generator = started[0].token_generator if started else TokenGenerator(pool.tokenizer, 0, [], config)
    formatter.extra_fields["session"] = session_id
    outputs = iterate_in_threadpool(deltas, first)
    return await service.respond(body, [Choice(generator)], outputs, num_read + len(prompt), num_read, formatter)


def _encode(body: ChatBody, service: CompletionService, *, continues: bool) -> list[int]:
    """Return the tokens of the rendered messages; with ``continues``, of those after an answer of the model."""
    template = service.chat_template
    if template is None:
        message = f"The model '{service.model_name}' has no chat template."
        raise APIError(400, message, "Use /v1/completions.", code="no_chat_template")
    try:
        render = template.render_continuation if continues else template.render
        text = render(**body.template_options())
    except MemtxError as error:
        raise APIError(400, error.message, error.hint, param="messages") from error
    ids: list[int] = service.pool.tokenizer.encode(text, parse_special=True).tolist()
    return ids
