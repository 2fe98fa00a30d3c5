"""One text that goes on: logits come in, the next token to be read and pieces of whole characters come out.

It calls no model, so it does not matter whether its row is decoded alone or among others.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.inference.sampling import NEG_INF, SamplingParams, sample_token

REPETITION_WINDOW = 256
"""Tokens that the repetition penalty looks back at; fixed, so that cost and memory stay the same."""

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
"""Why a text ended: a stop string came, or it has as many tokens as were asked for."""


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may still become one.

    Args:
        stop_strings: texts that end the generation; they are not part of it.

    Raises:
        MemtxError: an empty stop string.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise MemtxError("A stop string is empty, so it would stop at once.", "Leave it out.")
        self.stop_strings = tuple(stop_strings)
        self.is_stopped = False
        self._buffer = ""

    def feed(self, text: str) -> str:
        """Return what may be shown after ``text`` came; sets ``is_stopped`` where a stop string is complete."""
        self._buffer += text
        ends = [place for stop in self.stop_strings if (place := self._buffer.find(stop)) >= 0]
        if ends:
            shown, self._buffer, self.is_stopped = self._buffer[: min(ends)], "", True
            return shown
        kept = 0
        for stop in self.stop_strings:
            for length in range(min(len(stop) - 1, len(self._buffer)), kept, -1):
                if self._buffer.endswith(stop[:length]):
                    kept = length
                    break
        shown = self._buffer[: len(self._buffer) - kept]
        self._buffer = self._buffer[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return what was held back: no stop string can follow any more."""
        shown, self._buffer = self._buffer, ""
        return shown


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a text that was made.

    Attributes:
        token: its id.
        logprob: its log-probability in nats under the model itself, before temperature and filters.
        top_logprobs: the likeliest tokens there and theirs, likeliest first; as many as were asked for.
        text_offset: characters of the text before it, among the whole ones.
    """

    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    text_offset: int


@dataclass(frozen=True)
class TextDelta:
    """What may be shown at once.

    Attributes:
        text: whole characters.
        token_logprobs: those whose text begins in what was shown so far; only where log-probabilities were asked for.
    """

    text: str = ""
    token_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is to go on.

    Attributes:
        max_tokens: tokens made at most.
        sampling_params: how each is chosen.
        stop: texts that end it; they are not shown.
        seed: of the draws.
        logprobs: how many likely tokens to name beside each chosen one; None for no log-probabilities at all.

    Raises:
        MemtxError: a negative number, or a seed of more than 64 bits.
    """

    max_tokens: int = 256
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise MemtxError(f"max_tokens is {self.max_tokens}, expected at least 0.")
        if self.logprobs is not None and self.logprobs < 0:
            raise MemtxError(f"logprobs is {self.logprobs}, expected at least 0.")
        if not -(2**63) <= self.seed < 2**64:
            raise MemtxError(f"seed is {self.seed}, expected a number of 64 bits.")
        StopFilter(self.stop)


class TokenGenerator:
    """The rest of one text.

    Args:
        tokenizer: the model's.
        last_token: the newest token of the text, which the model has not read yet.
        recent_tokens: the newest tokens of the text, for the repetition penalty.
        config: how to go on.

    Attributes:
        next_token: the one to be read next.
        num_generated: tokens made so far.
        finish_reason: why it ended; None while it goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer, last_token: int, recent_tokens: Sequence[int], config: GenerationConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.next_token = last_token
        self.num_generated = 0
        self.finish_reason: str | None = None if config.max_tokens else FINISH_LENGTH
        self._recent_tokens: deque[int] = deque(recent_tokens, maxlen=REPETITION_WINDOW)
        self._stop_filter = StopFilter(config.stop)
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._generator = torch.Generator().manual_seed(config.seed)
        self._num_decoded_chars = self._num_emitted_chars = 0
        self._pending_logprobs: deque[TokenLogprob] = deque()

    def advance(self, logits: Tensor) -> TextDelta:
        """Choose the next token.

        Args:
            logits: (vocab,) of the model after ``next_token``.

        Returns:
            What can be shown by now, which may be nothing.

        Raises:
            MemtxError: logits that are not finite.
        """
        logits = logits.detach().float().cpu()
        allowed = logits.clone()
        allowed[self.tokenizer.bos_token_id] = NEG_INF
        # A model may know more ids than its tokenizer, where the vocabulary was rounded up.
        allowed[self.tokenizer.vocab_size :] = NEG_INF
        sampling = self.config.sampling_params
        recent = np.unique(np.asarray(self._recent_tokens if sampling.repetition_penalty != 1 else (), dtype=np.int64))
        self.next_token = sample_token(allowed, sampling, torch.from_numpy(recent), self._generator)
        self._recent_tokens.append(self.next_token)
        self.num_generated += 1
        if self.config.logprobs is not None:
            self._pending_logprobs.append(self._token_logprob(logits, allowed, self.config.logprobs))
        return self._to_delta(self.tokenizer.token_bytes(self.next_token))

    def _token_logprob(self, logits: Tensor, allowed: Tensor, num_logprobs: int) -> TokenLogprob:
        # Under the whole vocabulary, as texts are scored: what was read and what was made can be compared.
        whole = logits.logsumexp(0)
        values, tokens = allowed.topk(min(num_logprobs, int((allowed > NEG_INF).sum())))
        likely = zip(tokens.tolist(), (values - whole).tolist(), strict=True)
        return TokenLogprob(
            self.next_token, float(logits[self.next_token] - whole), tuple(likely), self._num_decoded_chars
        )

    def _to_delta(self, token_bytes: bytes) -> TextDelta:
        text = self._utf8_decoder.decode(token_bytes)
        self._num_decoded_chars += len(text)
        shown = self._stop_filter.feed(text)
        if self._stop_filter.is_stopped:
            self.finish_reason = FINISH_STOP
        elif self.num_generated == self.config.max_tokens:
            shown += self._stop_filter.feed(self._utf8_decoder.decode(b"", True))
            shown += "" if self._stop_filter.is_stopped else self._stop_filter.finish()
            self.finish_reason = FINISH_STOP if self._stop_filter.is_stopped else FINISH_LENGTH
        self._num_emitted_chars += len(shown)
        ready = []
        # A token is shown with its first character; one that only ends a character goes with those before it.
        while self._pending_logprobs and (
            self._pending_logprobs[0].text_offset < self._num_emitted_chars or self.finish_reason == FINISH_LENGTH
        ):
            ready.append(self._pending_logprobs.popleft())
        return TextDelta(shown, tuple(ready))
