"""Text generation: continues a text from a reader's state, so that no text is read twice."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import SampledToken, SamplingParams, SamplingRow, TokenCounts, sample_batch
from memtx.models.recurrent_lm import RecurrentLanguageModel

FinishReason = Literal["stop", "length", "cancelled"]
"""Reason: an end token, stop token or stop string; the maximum number of tokens; or cancellation."""


class StopFilter:
    """Passes text up to the first stop string and holds back text that may begin one; no stop string may be empty."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise MemtxError("A stop string is empty.", "Remove it from the stop strings.")
        self.stop_strings = tuple(stop_strings)
        self.is_stopped = False
        self._buffer = ""

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """Add ``text`` and return text that is safe to show; set ``is_stopped`` at a stop string that ends in it.

        Without ``may_stop``, stop strings that end in ``text`` are plain text.
        """
        old_length = len(self._buffer)
        self._buffer += text
        indices = (self._buffer.find(stop, max(0, old_length - len(stop) + 1)) for stop in self.stop_strings)
        stops = [index for index in indices if index >= 0]
        if stops and may_stop:
            visible, self._buffer, self.is_stopped = self._buffer[: min(stops)], "", True
            return visible
        num_held = 0
        for stop in self.stop_strings:
            lengths = range(min(len(stop) - 1, len(self._buffer)), num_held, -1)
            num_held = next((length for length in lengths if self._buffer.endswith(stop[:length])), num_held)
        end = len(self._buffer) - num_held
        visible, self._buffer = self._buffer[:end], self._buffer[end:]
        return visible

    def finish(self) -> str:
        """Return the text held back, since no more text follows."""
        visible, self._buffer = self._buffer, ""
        return visible


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token.

    Attributes:
        logprob: Log-probability in nats, before temperature and filters; None for a begin token in a prompt.
        top_logprobs: Ids and log-probabilities of the most likely tokens at its position, best first.
        text_offset: Number of complete characters before the token.
        content: Bytes of the text that it stands for, which may lack a space that the token spells.
    """

    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    text_offset: int
    content: bytes = b""


@dataclass(frozen=True)
class TextDelta:
    """Complete characters of a generated text and, if requested, log-probabilities of the tokens that begin in them."""

    text: str = ""
    token_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationConfig:
    """Options of one generated text, as for :func:`generate`.

    ``logprobs`` is the number of most likely tokens to return with each token; None disables log-probabilities. Raises
    MemtxError if a number is out of range, the seed does not fit into 64 bits, or a stop string is empty.
    """

    max_tokens: int = 256
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, value in (
            ("max_tokens", self.max_tokens),
            ("logprobs", self.logprobs),
            ("min_tokens", self.min_tokens),
            ("stop_token_ids", min(self.stop_token_ids, default=0)),
        ):
            if value is not None and value < 0:
                raise MemtxError(f"{name} is {value}, expected at least 0.")
        if self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) must be at most max_tokens ({self.max_tokens})."
            raise MemtxError(message, "Lower min_tokens or raise max_tokens.")
        if not -(2**63) <= self.seed < 2**64:
            raise MemtxError(f"seed is {self.seed}, expected a 64-bit integer.")
        StopFilter(self.stop)


class TokenGenerator:
    """Turns the logits of one stream into tokens and text; it does not call the model.

    Attributes:
        next_token: Token for the model to read next; initially ``last_token``, the last token of the text.
        num_generated: Number of tokens generated so far.
        finish_reason: Reason for the end of the text; None until then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        last_token: int | None,
        recent_tokens: Sequence[int],
        config: GenerationConfig,
        *,
        incomplete_bytes: bytes = b"",
    ) -> None:
        if last_token is None:
            message = "There is no text to continue, and the tokenizer has no begin token."
            raise MemtxError(message, "Give a prompt.")
        self.tokenizer, self.config = tokenizer, config
        self.next_token, self.num_generated = last_token, 0
        self.finish_reason: FinishReason | None = None if config.max_tokens else "length"
        self._counts = TokenCounts(recent_tokens)
        self._stop_filter = StopFilter((*config.stop, *(() if config.ignore_eos else tokenizer.stop_strings)))
        for token in (*config.stop_token_ids, *config.sampling_params.logit_bias):
            tokenizer.token_bytes(token)  # Raises if it is not in the vocabulary.
        self._end_token_ids = {*config.stop_token_ids, *(() if config.ignore_eos else tokenizer.eos_token_ids)}
        # No text but an end, so a model may always predict them, even one that is also the begin token.
        self._silent_token_ids = self._end_token_ids | set(tokenizer.eos_token_ids)
        # Published models are trained to predict whatever their texts hold; ours never see a begin token as a label.
        self._excluded_ids = set() if tokenizer.eos_token_ids else set(tokenizer.bos_token_ids)
        self._continues = last_token != tokenizer.bos_token_id
        self._decoder = tokenizer.decoder(continues=self._continues, pending=incomplete_bytes)
        self._random = Random(config.seed % 2**64)  # which would ignore the sign
        self._num_decoded_chars = self._num_emitted_chars = 0
        self._pending_logprobs: deque[TokenLogprob] = deque()

    def sampling_row(self) -> SamplingRow:
        """Return the settings of the next token for :func:`~memtx.inference.sampling.sample_batch`."""
        excluded = self._excluded_ids
        if self.num_generated < self.config.min_tokens:
            excluded = excluded | self._end_token_ids
        params = self.config.sampling_params
        return SamplingRow(params, self._random, self._counts, excluded, self.config.logprobs)

    def accept(self, sampled: SampledToken | MemtxError) -> TextDelta:
        """Append a sampled token and return the text that it completes; raises ``sampled`` if it is an error."""
        if isinstance(sampled, MemtxError):
            raise sampled
        self.next_token = sampled.token
        self._counts.add(sampled.token)
        self.num_generated += 1
        # Of the end token too, which has no text: clients of OpenAI's API count on one entry per generated token.
        if self.config.logprobs is not None:
            offset = self._num_decoded_chars + self._decoder.num_chars_before(sampled.token)
            continues = self._continues or self.num_generated > 1
            (content,) = self.tokenizer.token_contents([sampled.token], continues=continues)
            entry = TokenLogprob(sampled.token, sampled.logprob, sampled.top_logprobs, offset, content)
            self._pending_logprobs.append(entry)
        if self.next_token in self._end_token_ids:
            self.finish_reason = "stop"
            return self._to_delta(None)
        return self._to_delta(None if self.next_token in self._silent_token_ids else self.next_token)

    def advance(self, logits: Tensor) -> TextDelta:
        """Choose a token by the ``(vocab,)`` logits after ``next_token``; return the text that it completes."""
        return self.accept(sample_batch(logits[None], [self.sampling_row()], self.tokenizer.vocab_size)[0])

    def _to_delta(self, token: int | None) -> TextDelta:
        if self.finish_reason is None and self.num_generated == self.config.max_tokens:
            self.finish_reason = "length"
        decoded = self._decoder.feed(token) if token is not None else ""
        if self.finish_reason is not None:
            decoded += self._decoder.finish()
        self._num_decoded_chars += len(decoded)
        text = self._stop_filter.feed(decoded, may_stop=self.num_generated > self.config.min_tokens)
        if self._stop_filter.is_stopped:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self._stop_filter.finish()
        self._num_emitted_chars += len(text)
        # A token is returned with its first character; one that only completes a character, with the tokens before it.
        is_complete = self.finish_reason is not None and not self._stop_filter.is_stopped
        end = math.inf if is_complete else self._num_emitted_chars
        logprobs = []
        while self._pending_logprobs and self._pending_logprobs[0].text_offset < end:
            logprobs.append(self._pending_logprobs.popleft())
        return TextDelta(text, tuple(logprobs))


def generate(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    reader: StreamReader | None = None,
    segment_length: int = 512,
    max_tokens: int = 256,
    sampling_params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    min_tokens: int = 0,
) -> Iterator[str]:
    """Generate a continuation of a text; yields non-empty parts of complete characters.

    The text ends at an end token or stop string of the model (``tokenizer.eos_token_ids``, ``tokenizer.stop_strings``),
    a stop token or a stop string, none of which is returned.

    Args:
        model: Language model; a module is put into eval mode.
        tokenizer: Tokenizer of the model.
        prompt: Text of any length, read in segments.
        reader: Reader whose text the prompt continues; it is left unchanged. Defaults to a new document.
        segment_length: Tokens per segment of the prompt; unused with ``reader``.
        max_tokens: Maximum number of generated tokens.
        sampling_params: Sampling options. Defaults to plain sampling.
        stop: Strings that end the text.
        seed: Random seed; equal seeds give equal texts on the same machine and version of torch.
        stop_token_ids: Ids that end the text, beside the model's end tokens.
        ignore_eos: If True, the model's end tokens and stop strings do not end the text.
        min_tokens: Number of tokens before which neither a token nor a string ends the text.

    Raises:
        MemtxError: A number is out of range, a stop string is empty, or the logits are not finite.
    """
    # Checked here because a generator function runs only at the first next().
    config = GenerationConfig(
        max_tokens,
        sampling_params or SamplingParams(),
        tuple(stop),
        seed,
        stop_token_ids=tuple(stop_token_ids),
        ignore_eos=ignore_eos,
        min_tokens=min_tokens,
    )
    return _generate(reader.fork() if reader else StreamReader(model, tokenizer, segment_length), prompt, config)


def collect_recent_tokens(results: Iterable[SegmentResult]) -> list[int]:
    """Return the ids that occur in a text, for the repetition penalty."""
    ids: set[int] = set()
    for result in results:
        ids.update(np.unique(result.tokens).tolist())
    return sorted(ids)


def _generate(reader: StreamReader, prompt: str, config: GenerationConfig) -> Iterator[str]:
    recent_tokens = collect_recent_tokens(chain(reader.feed(prompt), reader.finish()))
    inputs = (reader.tokenizer, reader.last_token, recent_tokens)
    token_generator = TokenGenerator(*inputs, config, incomplete_bytes=reader.incomplete_bytes)
    decoder = Decoder(reader.model, reader.state)
    while token_generator.finish_reason is None:
        logits = decoder.step(torch.tensor([token_generator.next_token], device=reader.device))[0]
        if text := token_generator.advance(logits).text:
            yield text
