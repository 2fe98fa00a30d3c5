"""``/v1/completions``, as OpenAI's clients use it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memtx.inference.engine import Generation
from memtx.inference.generate import TextDelta, TokenGenerator, TokenLogprob, collect_recent_tokens
from memtx.inference.reader import StreamReader
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.errors import APIError
from memtx.serving.limits import Limits, get_deadline
from memtx.serving.metrics import PoolMetrics
from memtx.serving.responses import ChoiceBuilder, CompletionFormatter, format_usage, get_prompt_logprobs
from memtx.serving.routes import check_model
from memtx.serving.schemas import CompletionBody, GenerationBody
from memtx.serving.sse import OutputStream, TokenQueue, stream_sse

MAX_CONCURRENT_PROMPTS = 16
"""Prompts of one request that are read at the same time."""


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt that was read.

    Attributes:
        text: as it is echoed.
        tokens: likewise, where log-probabilities are shown.
        num_tokens: of its tokens.
        reader: stands at its end.
        recent_tokens: its newest tokens.
    """

    text: str
    tokens: list[TokenLogprob]
    num_tokens: int
    reader: StreamReader
    recent_tokens: list[int]


class CompletionService:
    """Makes texts for requests.

    Args:
        pool: reads and makes.
        model_name: of the model.
        limits: to be kept.
        metrics: counts tokens.
    """

    def __init__(self, pool: SessionPool, model_name: str, limits: Limits, metrics: PoolMetrics) -> None:
        self.pool = pool
        self.model_name = model_name
        self.limits = limits
        self.metrics = metrics

    def resolve_seeds(self, body: GenerationBody, num_prompts: int = 1) -> list[int]:
        """Return the seeds of the texts that are asked for, prompt by prompt.

        Raises:
            APIError: more is asked for than one request may.
        """
        tokens, choices = body.max_tokens or 0, (body.n or 1) * num_prompts
        for name, asked, most in (
            ("max_tokens", tokens, self.limits.max_tokens),
            ("n", choices, self.limits.max_choices),
        ):
            if asked > most:
                raise APIError(400, f"{name} makes {asked}, at most {most} may be.", "Ask for less.", param=name)
        seed = body.seed if body.seed is not None else secrets.randbits(48)
        # Each text has a seed of its own that its place decides: the same request gives the same texts.
        return [(seed + place) % 2**63 for place in range(choices)]

    def prefill(
        self, reader: StreamReader, prompt: str | list[int], *, echo: bool, will_generate: bool
    ) -> PrefilledPrompt:
        """Read a prompt; blocks."""
        fed = reader.feed(prompt) if isinstance(prompt, str) else reader.feed_tokens(prompt)
        results = list(chain(fed, reader.finish(discard_state=not will_generate)))
        text = prompt if isinstance(prompt, str) else self.pool.tokenizer.decode(prompt)
        count = sum(len(result.tokens) for result in results)
        return PrefilledPrompt(
            text if echo else "",
            get_prompt_logprobs(results) if echo else [],
            count,
            reader,
            collect_recent_tokens(results),
        )

    async def generate(
        self, request: Request, body: GenerationBody, prompts: list[PrefilledPrompt], seeds: list[int]
    ) -> Response:
        """Make the texts and answer, whole or as a stream."""
        answer = CompletionFormatter(self.model_name, self.pool.tokenizer, body.logprobs is not None)
        inbox, deadline = TokenQueue(), get_deadline(request)
        requests, n = body.to_generation_configs(seeds), body.n or 1
        generations: list[Generation] = []
        for place, prompt in enumerate(prompts):
            part = range(place * n, (place + 1) * n)
            generations += self.pool.start_generation(
                prompt.reader,
                prompt.recent_tokens,
                [requests[index] for index in part],
                deadline=deadline,
                on_outputs=[partial(inbox.put, index) for index in part],
            )
        pieces = inbox.stream_outputs(generations, request, deadline)
        texts = [generation.token_generator for generation in generations]
        return await self.respond(body, answer, [prompts[index // n] for index in range(len(texts))], texts, pieces)

    async def respond(
        self,
        body: GenerationBody,
        formatter: CompletionFormatter,
        prompts: list[PrefilledPrompt],
        token_generators: list[TokenGenerator],
        outputs: OutputStream,
    ) -> Response:
        """Answer with pieces as they come, or with all of them at the end; one prompt and one text a choice."""
        if body.stream:
            chunks = self._stream_chunks(body, formatter, prompts, token_generators, outputs)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream_sse(chunks), media_type="text/event-stream", headers=headers)
        made = [ChoiceBuilder(prompt.text, list(prompt.tokens)) for prompt in prompts]
        async for index, piece in outputs:
            made[index].add(_shift_offsets(piece, len(prompts[index].text)))
        choices = [
            formatter.format_choice(index, one.text, one.tokens, token_generators[index].finish_reason)
            for index, one in enumerate(made)
        ]
        return JSONResponse(formatter.format_response(choices, self._record_usage(prompts, token_generators)))

    async def _stream_chunks(
        self,
        body: GenerationBody,
        formatter: CompletionFormatter,
        prompts: list[PrefilledPrompt],
        token_generators: list[TokenGenerator],
        outputs: OutputStream,
    ) -> AsyncIterator[dict[str, Any]]:
        for index, prompt in enumerate(prompts):
            if prompt.text:
                yield formatter.format_response(
                    [formatter.format_choice(index, prompt.text, prompt.tokens, None)], None
                )
        async for index, piece in outputs:
            moved = _shift_offsets(piece, len(prompts[index].text))
            yield formatter.format_response(
                [formatter.format_choice(index, moved.text, moved.token_logprobs, None)], None
            )
        for index, text in enumerate(token_generators):
            yield formatter.format_response([formatter.format_choice(index, "", [], text.finish_reason)], None)
        usage = self._record_usage(prompts, token_generators)
        if body.include_usage:
            yield formatter.format_response([], usage)

    def _record_usage(self, prompts: list[PrefilledPrompt], token_generators: list[TokenGenerator]) -> dict[str, int]:
        made = sum(text.num_generated for text in token_generators)
        self.metrics.generated_tokens.inc(made)
        return format_usage(sum(prompt.num_tokens for prompt in {id(one): one for one in prompts}.values()), made)


def _shift_offsets(piece: TextDelta, prefix_length: int) -> TextDelta:
    """Return a piece whose tokens' offsets count the echoed prompt as well."""
    return TextDelta(
        piece.text, tuple(replace(one, text_offset=one.text_offset + prefix_length) for one in piece.token_logprobs)
    )


def build_completions_router(service: CompletionService) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Go on with one or more prompts; ``echo`` with ``max_tokens`` 0 scores them."""
        check_model(body.model, service.model_name)
        prompts = body.prompts()
        if not prompts:
            raise APIError(400, "The prompt is an empty list.", "Give a text or tokens.", param="prompt")
        seeds = service.resolve_seeds(body, len(prompts))
        body.to_generation_configs(seeds[:1])  # What is wrong with numbers is said before anything is read.
        echo, top = bool(body.echo), body.logprobs or 0
        # Without log-probabilities the text is all that is echoed, and needs no likely tokens.
        wanted = top if echo else 0

        def prefill_one(prompt: str | list[int]) -> PrefilledPrompt:
            reader = service.pool.new_reader(num_logprobs=wanted, deadline=get_deadline(request))
            return service.prefill(reader, prompt, echo=echo, will_generate=body.max_tokens != 0)

        def prefill_all() -> list[PrefilledPrompt]:
            if len(prompts) == 1:
                return [prefill_one(prompts[0])]
            with ThreadPoolExecutor(min(len(prompts), MAX_CONCURRENT_PROMPTS)) as threads:
                return list(threads.map(prefill_one, prompts))

        return await service.generate(request, body, await to_thread.run_sync(prefill_all), seeds)

    return routes
