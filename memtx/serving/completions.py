"""``/v1/completions``, compatible with OpenAI clients."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, cast

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from memtx.errors import MemtxError
from memtx.inference.chat_template import ChatTemplate
from memtx.inference.engine import Generation
from memtx.inference.generate import GenerationConfig, TextDelta, TokenGenerator, TokenLogprob
from memtx.inference.reader import StreamReader
from memtx.inference.sessions.pool import SessionPool
from memtx.serving.errors import APIError, check_model
from memtx.serving.limits import Deadline, Limits
from memtx.serving.metrics import PoolMetrics
from memtx.serving.responses import CompletionFormatter, OutputStream, TokenQueue, get_prompt_logprobs, stream_sse
from memtx.serving.schemas import CompletionBody, GenerationBody

MAX_CONCURRENT_PROMPTS = 16
"""Prompts of one request that are read concurrently."""

Prompt = str | list[int]
"""Text or tokens."""


@dataclass(frozen=True)
class PrefilledPrompt:
    """Prompt that has been read: text and log-probabilities to echo, empty without echo, and the reader at its end."""

    text: str
    logprobs: list[TokenLogprob]
    num_tokens: int
    reader: StreamReader
    recent_tokens: list[int]
    num_cached_tokens: int = 0


@dataclass
class Choice:
    """One text of a response: its generator, and the echoed prompt and generated text with their log-probabilities."""

    token_generator: TokenGenerator
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._prompt_length, self._num_prompt_logprobs = len(self.text), len(self.logprobs)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the generated tokens, which must have been requested."""
        values = [entry.logprob or 0.0 for entry in self.logprobs[self._num_prompt_logprobs :]]
        return sum(values) / max(len(values), 1)

    def shift_offsets(self, delta: TextDelta) -> list[TokenLogprob]:
        """Return the log-probabilities of a piece with text offsets that count the echoed prompt."""
        return [replace(entry, text_offset=entry.text_offset + self._prompt_length) for entry in delta.token_logprobs]


@dataclass(frozen=True)
class CompletionService:
    """Generation of texts for requests, within the limits."""

    pool: SessionPool
    model_name: str
    limits: Limits
    metrics: PoolMetrics
    chat_template: ChatTemplate | None = None

    def build_configs(self, body: GenerationBody, num_prompts: int = 1) -> list[GenerationConfig]:
        """Return the settings of each text of a request, prompt by prompt.

        Raises APIError if a number is out of range or exceeds a limit.
        """
        num_texts, limits = body.num_candidates * num_prompts, self.limits
        if "max_tokens" not in body.model_fields_set:  # a default exceeds no limit
            body = body.model_copy(update={"max_tokens": min(body.max_tokens or 16, limits.max_tokens)})
        candidates = "best_of" if body.num_candidates > (body.n or 1) else "n"
        for name, value, maximum in (
            ("max_tokens", body.max_tokens or 0, limits.max_tokens),
            ("prompts", num_prompts, limits.max_choices),
            (candidates, body.num_candidates, limits.max_choices),
            (f"{candidates} x prompts", num_texts, limits.max_choices),
        ):
            if value > maximum:
                param = "prompt" if name.endswith("prompts") else name
                raise APIError(400, f"{name} ({value}) must be at most {maximum}.", "Ask for less.", param=param)
        seed = body.seed if body.seed is not None else secrets.randbits(48)
        # A seed per text that depends on its index only, so that equal requests give equal texts.
        try:
            return body.to_generation_configs([(seed + index) % 2**63 for index in range(num_texts)])
        except MemtxError as error:
            param = error.message.partition(" ")[0]  # the message begins with the name of the option
            raise APIError(400, error.message, error.hint, param=param) from error

    def prefill(
        self,
        reader: StreamReader,
        prompt: Prompt,
        body: GenerationBody,
        deadline: float,
        *,
        echo: bool = False,
        namespace: str = "",
    ) -> PrefilledPrompt:
        """Read a prompt, without the part that the prefix cache holds for ``namespace``.

        Blocks until it is read, or raises DeadlineExceededError.
        """
        options: dict[str, Any] = {"namespace": namespace, "deadline": deadline, "discard_state": body.max_tokens == 0}
        read = self.pool.read_prompt(reader, prompt, needs_scores=echo, **options)
        text, logprobs = "", list[TokenLogprob]()
        if echo:
            # A character that the generated text completes belongs to that text.
            complete_only = body.max_tokens != 0
            decode = self.pool.tokenizer.decode
            text = prompt if isinstance(prompt, str) else decode(prompt, complete_only=complete_only)
        if echo and body.num_logprobs is not None:
            logprobs = get_prompt_logprobs(read.results, prompt, self.pool.tokenizer, deadline)
        num_tokens = len(read.tokens) if isinstance(prompt, str) else len(prompt)
        recent_tokens = np.unique(read.tokens).tolist()
        return PrefilledPrompt(text, logprobs, num_tokens, reader, recent_tokens, read.num_cached_tokens)

    async def generate(
        self,
        request: Request,
        body: GenerationBody,
        prompts: list[PrefilledPrompt],
        configs: list[GenerationConfig],
        deadline: float,
        formatter: CompletionFormatter | None = None,
    ) -> Response:
        """Generate equally many texts per prompt, one per config, and return the response, whole or streamed."""
        token_queue, texts_per_prompt = TokenQueue(), len(configs) // len(prompts)
        generations: list[Generation] = []
        choices: list[Choice] = []
        for prompt in prompts:
            indices = range(len(choices), len(choices) + texts_per_prompt)
            started = self.pool.start_generation(
                prompt.reader,
                prompt.recent_tokens,
                [configs[index] for index in indices],
                deadline=deadline,
                on_outputs=[partial(token_queue.put, index) for index in indices],
            )
            generations += started
            choices += [Choice(generation.token_generator, prompt.text, [*prompt.logprobs]) for generation in started]
        outputs = token_queue.stream_outputs(generations, request, deadline)
        num_tokens = sum(prompt.num_tokens for prompt in prompts)
        num_cached = sum(prompt.num_cached_tokens for prompt in prompts)
        return await self.respond(body, choices, outputs, num_tokens, num_cached, formatter)

    async def respond(
        self,
        body: GenerationBody,
        choices: list[Choice],
        outputs: OutputStream,
        num_prompt_tokens: int,
        num_cached_tokens: int = 0,
        formatter: CompletionFormatter | None = None,
    ) -> Response:
        """Return the response: the pieces as they come, or all of them at the end.

        ``formatter`` defaults to that of completions.
        """
        settings = (self.model_name, self.pool.tokenizer, body.num_logprobs is not None)
        formatter = formatter or CompletionFormatter(*settings)
        format_choice, format_chunk = formatter.format_choice, formatter.format_chunk
        format_delta = partial(format_choice, is_delta=True)

        async def stream_chunks() -> AsyncIterator[dict[str, Any]]:
            for index in range(len(choices)):
                if first := formatter.format_first(index):
                    yield format_chunk([first])
            for index, choice in enumerate(choices):
                if choice.text:
                    # In a thread, since a prompt may be long.
                    echoed = await to_thread.run_sync(format_delta, index, choice.text, choice.logprobs)
                    yield format_chunk([echoed])
            async for index, delta in outputs:
                yield format_chunk([format_delta(index, delta.text, choices[index].shift_offsets(delta))])
            for index, choice in enumerate(choices):
                yield format_chunk([format_delta(index, "", [], choice.token_generator.finish_reason)])
            usage = self._record_usage(choices, num_prompt_tokens, num_cached_tokens)
            if body.include_usage:
                yield format_chunk([], usage)

        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream_sse(stream_chunks()), media_type="text/event-stream", headers=headers)
        async for index, delta in outputs:
            choices[index].text += delta.text
            choices[index].logprobs += choices[index].shift_offsets(delta)
        usage = self._record_usage(choices, num_prompt_tokens, num_cached_tokens)

        def format_all() -> Response:
            formatted = [
                format_choice(index, choice.text, choice.logprobs, choice.token_generator.finish_reason)
                for index, choice in enumerate(_select_best(choices, body.num_candidates, body.n or 1))
            ]
            return JSONResponse(formatter.format_response(formatted, usage))

        return await to_thread.run_sync(format_all)

    def _record_usage(self, choices: list[Choice], num_prompt_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
        """Count the generated tokens, and return the numbers of tokens of the prompts, cached and generated."""
        num_generated = sum(choice.token_generator.num_generated for choice in choices)
        self.metrics.generated_tokens.inc(num_generated)
        total = num_prompt_tokens + num_generated
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_generated, "total_tokens": total}
        return usage | {"prompt_tokens_details": {"cached_tokens": num_cached_tokens}}


def _select_best(choices: Sequence[Choice], num_candidates: int, num_texts: int) -> Sequence[Choice]:
    """Return the texts of each prompt that are the most likely by mean over their tokens, best first."""
    if num_candidates == num_texts:
        return choices
    groups = [choices[start : start + num_candidates] for start in range(0, len(choices), num_candidates)]
    ranked = [sorted(group, key=lambda choice: -choice.mean_logprob) for group in groups]
    return [choice for group in ranked for choice in group[:num_texts]]


async def get_service(request: Request) -> CompletionService:
    """Return the service of the application."""
    return cast(CompletionService, request.app.state.service)


Service = Annotated[CompletionService, Depends(get_service)]
router = APIRouter()


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request, service: Service, deadline: Deadline) -> Response:
    """Continue one or more prompts; ``echo`` with ``max_tokens`` 0 scores them."""
    check_model(body.model, service.model_name)
    prompts = body.prompts()
    if not prompts:
        raise APIError(400, "The prompt is an empty list.", "Give a text or tokens.", param="prompt")
    configs = service.build_configs(body, len(prompts))
    echo, namespace = bool(body.echo), request.headers.get("authorization", "")

    def prefill(prompt: Prompt) -> PrefilledPrompt:
        reader = service.pool.new_reader(num_logprobs=(body.logprobs or 0) if echo else 0, deadline=deadline)
        if body.parse_special:
            reader.parse_special = True
        return service.prefill(reader, prompt, body, deadline, echo=echo, namespace=namespace)

    def prefill_all() -> list[PrefilledPrompt]:
        if len(prompts) == 1:
            return [prefill(prompts[0])]
        with ThreadPoolExecutor(min(len(prompts), MAX_CONCURRENT_PROMPTS)) as threads:
            return list(threads.map(prefill, prompts))

    return await service.generate(request, body, await to_thread.run_sync(prefill_all), configs, deadline)
