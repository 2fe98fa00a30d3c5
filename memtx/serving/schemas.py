"""Request bodies. An unknown field is rejected with a suggestion of the closest one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from memtx.inference.generate import GenerationConfig
from memtx.inference.sampling import SamplingParams


def _check_unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half of a surrogate pair at {error.start}") from error
    return text


def invalid_value(param: str, message: str) -> PydanticCustomError:
    """Return the error of a field whose value does not fit another field, or is not supported."""
    return PydanticCustomError("value_error", "{message}", {"param": param, "message": message})


def _check_prompt(value: Any) -> Any:
    """Check the kinds of entries, since pydantic would report a mismatch with each of the four types of a prompt."""
    if value is None:
        return ""
    entries = value if isinstance(value, list) else [value]
    if all(isinstance(entry, str) for entry in entries):
        return value
    for token_ids in value if isinstance(entries[0], list) else [value]:
        if not isinstance(token_ids, list) or any(type(token) is not int for token in token_ids):
            raise ValueError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists")
        if invalid := [token for token in token_ids if not 0 <= token < 2**31]:
            raise ValueError(f"prompt has the token id {invalid[0]}, expected an id of the vocabulary")
    return value


def _check_bias(biases: dict[str, float]) -> dict[str, float]:
    if invalid := [token for token in biases if not (token.isascii() and token.isdecimal() and len(token) < 10)]:
        raise ValueError(f"logit_bias has the key '{invalid[0][:80]}', expected a token id")
    return biases


Text = Annotated[str, AfterValidator(_check_unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[Text, Field(min_length=1, max_length=1000)]


class RequestBody(BaseModel):
    """JSON object of a request; a field that is null is as one that is absent."""

    # Strict: otherwise true would be 1, and "5" would be 5.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # Clients write out fields that nobody set.
        value = {name: content for name, content in value.items() if content is not None}
        if unknown := sorted(value.keys() - cls.model_fields.keys()):
            # A name may hold half of a surrogate pair, which a message cannot.
            name = str(unknown[0]).encode("utf-8", "replace").decode()[:80]
            context = {"name": name, "known": list(cls.model_fields)}
            raise PydanticCustomError("extra_forbidden", "'{name}' is not a field of this request", context)
        return value


class GenerationBody(RequestBody):
    """Settings of a generated text: OpenAI's names, and those of vLLM for what OpenAI lacks."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0  # in vLLM, -1 too keeps all
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_check_bias)] | None = (
        None
    )
    n: Annotated[int, Field(ge=1, le=1024)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_support(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid_value(
                "stream_options", "stream_options needs stream; set stream to true or remove stream_options"
            )
        return self

    def to_generation_configs(self, seeds: list[int]) -> list[GenerationConfig]:
        """Return the settings of one text per seed; raises MemtxError if a number is out of range."""
        names = ["temperature", "top_p", "top_k", "min_p", "typical_p"]
        names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        values["top_k"] = max(self.top_k, 0)
        values["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        # Candidates are compared by their log-probabilities.
        logprobs = self.num_logprobs
        if logprobs is None and self.num_candidates > (self.n or 1):
            logprobs = 0
        config = GenerationConfig(
            16 if self.max_tokens is None else self.max_tokens,
            SamplingParams(**values),
            (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logprobs=logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
        )
        return [replace(config, seed=seed) for seed in seeds]

    @property
    def num_candidates(self) -> int:
        """Number of texts to generate per prompt, of which ``n`` are returned."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Number of likely tokens to return with each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def include_usage(self) -> bool:
        """If True, a stream ends with the usage."""
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionBody(GenerationBody):
    """``POST /v1/completions``; with ``parse_special``, text that spells a special token becomes that token."""

    model: str
    prompt: Annotated[Text | list[Text] | list[TokenId] | list[list[TokenId]], BeforeValidator(_check_prompt)] = ""
    echo: bool | None = False
    suffix: Text | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    parse_special: bool = False

    @model_validator(mode="after")
    def _reject_unsupported(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise invalid_value("best_of", f"best_of is {self.best_of}, expected at least n ({self.n or 1})")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise invalid_value(
                "best_of", "best_of compares complete texts, which cannot be streamed; remove stream or best_of"
            )
        if self.suffix:
            raise invalid_value(
                "suffix", "suffix is not supported, since the model only continues texts; remove suffix"
            )
        return self

    @property
    def num_candidates(self) -> int:
        """Number of texts to generate per prompt, of which ``n`` are returned."""
        return self.best_of or self.n or 1

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class GenerateBody(GenerationBody):
    """``POST /v1/sessions/ID/generate``; with ``update_session``, the session reads the prompt and the new text."""

    prompt: Text = ""
    parse_special: bool = False
    update_session: bool = False
    save: bool = False


class CreateBody(RequestBody):
    """``POST /v1/sessions``; ``parse_special`` here and below as in :class:`CompletionBody`."""

    text: Text = ""
    parse_special: bool = False
    save: bool = False


class FeedBody(RequestBody):
    """``POST /v1/sessions/ID/feed``; with ``end_of_text``, a remainder shorter than a segment is also read."""

    text: Text
    parse_special: bool = False
    end_of_text: bool = False
    save: bool = False


class ScoreBody(RequestBody):
    """``POST /v1/sessions/ID/score``."""

    text: Text
    parse_special: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    return_hidden_states: bool = False


class PredictBody(RequestBody):
    """``POST /v1/predict``; an input is a raw text, or an object with the fields of an example.

    The other fields are for encoder-decoders, which have defaults of their own.
    """

    input: Text | dict[str, Any] | list[Text | dict[str, Any]]
    model: str | None = None
    num_beams: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_length: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    min_length: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    temperature: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def generation_options(self) -> dict[str, Any]:
        """Return the options of generation that the request has."""
        values = self.model_dump(exclude={"input", "model"}, exclude_none=True)
        return values | ({"top_k": max(0, values["top_k"])} if "top_k" in values else {})

    @model_validator(mode="after")
    def _check_characters(self) -> PredictBody:
        for value in self.inputs():
            if isinstance(value, dict):
                _check_unicode(json.dumps(value, ensure_ascii=False))
        return self

    def inputs(self) -> list[str | dict[str, Any]]:
        """Return the inputs as a list."""
        return list(self.input) if isinstance(self.input, list) else [self.input]
