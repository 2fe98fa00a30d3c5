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
from memtx.inference.sampling import NEVER, Sampling, choose

RECENT = 256
"""Tokens that the repetition penalty looks back at; fixed, so that cost and memory stay the same."""

STOPPED = "stop"
FULL = "length"
"""Why a text ended: a stop string came, or it has as many tokens as were asked for."""


class StopFilter:
    """Lets text through up to the first stop string, and holds back what may still become one.

    Args:
        stops: texts that end the generation; they are not part of it.

    Raises:
        MemtxError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise MemtxError("A stop string is empty, so it would stop at once.", "Leave it out.")
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Return what may be shown after ``text`` came; sets ``stopped`` where a stop string is complete."""
        self._held += text
        ends = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if ends:
            shown, self._held, self.stopped = self._held[: min(ends)], "", True
            return shown
        kept = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self._held)), kept, -1):
                if self._held.endswith(stop[:length]):
                    kept = length
                    break
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(shown) :]
        return shown

    def finish(self) -> str:
        """Return what was held back: no stop string can follow any more."""
        shown, self._held = self._held, ""
        return shown


@dataclass(frozen=True)
class Chosen:
    """One token of a text that was made.

    Attributes:
        token: its id.
        logprob: its log-probability in nats under the model itself, before temperature and filters.
        top: the likeliest tokens there and theirs, likeliest first; as many as were asked for.
        offset: characters of the text before it, among the whole ones.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What may be shown at once.

    Attributes:
        text: whole characters.
        tokens: those whose text begins in what was shown so far; only where log-probabilities were asked for.
    """

    text: str = ""
    tokens: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Request:
    """How a text is to go on.

    Attributes:
        max_tokens: tokens made at most.
        sampling: how each is chosen.
        stop: texts that end it; they are not shown.
        seed: of the draws.
        top: how many likely tokens to name beside each chosen one; None for no log-probabilities at all.

    Raises:
        MemtxError: a negative number, or a seed of more than 64 bits.
    """

    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    seed: int = 0
    top: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise MemtxError(f"max_tokens is {self.max_tokens}, expected at least 0.")
        if self.top is not None and self.top < 0:
            raise MemtxError(f"top is {self.top}, expected at least 0.")
        if not -(2**63) <= self.seed < 2**64:
            raise MemtxError(f"seed is {self.seed}, expected a number of 64 bits.")
        StopFilter(self.stop)


class Continuation:
    """The rest of one text.

    Args:
        tokenizer: the model's.
        last: the newest token of the text, which the model has not read yet.
        recent: the newest tokens of the text, for the repetition penalty.
        request: how to go on.

    Attributes:
        token: the one to be read next.
        made: tokens made so far.
        finish: why it ended; None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, last: int, recent: Sequence[int], request: Request) -> None:
        self.tokenizer = tokenizer
        self.request = request
        self.token = last
        self.made = 0
        self.finish: str | None = None if request.max_tokens else FULL
        self._recent: deque[int] = deque(recent, maxlen=RECENT)
        self._stops = StopFilter(request.stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._generator = torch.Generator().manual_seed(request.seed)
        self._decoded = self._shown = 0
        self._waiting: deque[Chosen] = deque()

    def advance(self, logits: Tensor) -> Piece:
        """Choose the next token.

        Args:
            logits: (vocab,) of the model after ``token``.

        Returns:
            What can be shown by now, which may be nothing.

        Raises:
            MemtxError: logits that are not finite.
        """
        logits = logits.detach().float().cpu()
        allowed = logits.clone()
        allowed[self.tokenizer.begin] = NEVER
        # A model may know more ids than its tokenizer, where the vocabulary was rounded up.
        allowed[self.tokenizer.vocab_size :] = NEVER
        sampling = self.request.sampling
        recent = np.unique(np.asarray(self._recent if sampling.repetition_penalty != 1 else (), dtype=np.int64))
        self.token = choose(allowed, sampling, torch.from_numpy(recent), self._generator)
        self._recent.append(self.token)
        self.made += 1
        if self.request.top is not None:
            self._waiting.append(self._chosen(logits, allowed, self.request.top))
        return self._piece(self.tokenizer.token_bytes(self.token))

    def _chosen(self, logits: Tensor, allowed: Tensor, top: int) -> Chosen:
        # Under the whole vocabulary, as texts are scored: what was read and what was made can be compared.
        whole = logits.logsumexp(0)
        values, tokens = allowed.topk(min(top, int((allowed > NEVER).sum())))
        likely = zip(tokens.tolist(), (values - whole).tolist(), strict=True)
        return Chosen(self.token, float(logits[self.token] - whole), tuple(likely), self._decoded)

    def _piece(self, content: bytes) -> Piece:
        text = self._decoder.decode(content)
        self._decoded += len(text)
        shown = self._stops.feed(text)
        if self._stops.stopped:
            self.finish = STOPPED
        elif self.made == self.request.max_tokens:
            shown += self._stops.feed(self._decoder.decode(b"", True))
            shown += "" if self._stops.stopped else self._stops.finish()
            self.finish = STOPPED if self._stops.stopped else FULL
        self._shown += len(shown)
        ready = []
        # A token is shown with its first character; one that only ends a character goes with those before it.
        while self._waiting and (self._waiting[0].offset < self._shown or self.finish == FULL):
            ready.append(self._waiting.popleft())
        return Piece(shown, tuple(ready))
