"""Request body of chat completions: OpenAI's fields, and those of vLLM for the chat template."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from memtx.serving.schemas import GenerationBody, Text, invalid_value


class TextPart(BaseModel):
    """Part of a message's content; further fields are for other servers."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    """Message of a conversation; the chat template sees further fields too."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    def to_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it, with the arguments of function calls parsed."""
        message = self.model_dump(exclude_none=True)
        for call in message.get("tool_calls", ()):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                with contextlib.suppress(ValueError):  # the model may have written no JSON
                    function["arguments"] = json.loads(function["arguments"])
        return message


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``; with ``session``, the conversation goes on from a state of constant size.

    With ``continue_final_message``, the text goes on with the last message. ``add_generation_prompt`` defaults to True
    otherwise: the text begins an answer.
    The fields from ``metadata`` on have no effect on the text.
    """

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = False  # type: ignore[assignment]
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    session: Annotated[str, Field(max_length=64)] | None = None
    save: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _reject_unsupported_chat(self) -> Self:
        for param, is_wrong, message in (
            ("top_logprobs", self.top_logprobs is not None and not self.logprobs, "needs logprobs; set it to true"),
            ("tool_choice", self.tool_choice not in (None, "none", "auto"), "must be none or auto"),
            ("response_format", (self.response_format or {}).get("type", "text") != "text", "must be text"),
            (
                "continue_final_message",
                self.continue_final_message and self.add_generation_prompt,
                "and add_generation_prompt exclude each other; remove one of them",
            ),
            ("save", self.session is None and self.save, "needs session; set session or remove save"),
            ("n", self.session is not None and (self.n or 1) > 1, "must be 1, since a session continues with one text"),
        ):
            if is_wrong:
                raise invalid_value(param, f"{param} {message}")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Number of likely tokens to return with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def with_max_tokens(self, limit: int) -> Self:
        """Return the body with ``max_tokens`` set; without either field, a text may have ``limit`` tokens."""
        limits = (self.max_completion_tokens, self.max_tokens, limit)
        return self.model_copy(update={"max_tokens": next(number for number in limits if number is not None)})

    def template_options(self) -> dict[str, Any]:
        """Return the arguments of ``ChatTemplate.render``."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {
            "tools": None if self.tool_choice == "none" else self.tools,
            "messages": [message.to_template() for message in self.messages],
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": self.continue_final_message,
            "variables": effort | (self.chat_template_kwargs or {}),
        }
