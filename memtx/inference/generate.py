"""Going on with a text: one token after the other from a state, so a book that was read is not read again."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch

from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.inference.reader import StreamReader
from memtx.inference.sampling import NEVER, Sampling, choose
from memtx.models.memory_transformer import MemoryTransformer

RECENT = 256
"""Tokens that the repetition penalty looks back at; fixed, so that cost and memory stay the same."""


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


def generate(
    model: MemoryTransformer,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    reader: StreamReader | None = None,
    segment: int = 512,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a text, piece by piece, as soon as its characters are whole.

    Args:
        model: put into eval mode.
        tokenizer: the one the model was trained with.
        prompt: of any length; read in segments. It goes on where ``reader`` stands, if one is given.
        reader: a stream that was read; stays as it is.
        segment: tokens a segment while the prompt is read, without ``reader``.
        max_tokens: tokens made at most.
        sampling: how each token is chosen; plain sampling by default.
        stop: texts that end it; they are not shown.
        seed: equal seeds give equal texts (on one machine and build of torch).

    Returns:
        An iterator over pieces of text, none of them empty.

    Raises:
        MemtxError: a negative ``max_tokens``, an empty stop string, or logits that are not finite.
    """
    # Checked here and not in the generator, which runs only when the first piece is asked for.
    if max_tokens < 0:
        raise MemtxError(f"max_tokens is {max_tokens}, expected at least 0.")
    stream = reader.fork() if reader is not None else StreamReader(model, tokenizer, segment)
    return _pieces(stream, prompt, max_tokens, sampling or Sampling(), StopFilter(stop), seed)


def _pieces(
    stream: StreamReader, prompt: str, max_tokens: int, sampling: Sampling, stops: StopFilter, seed: int
) -> Iterator[str]:
    recent: deque[int] = deque(maxlen=RECENT)
    for result in chain(stream.feed(prompt), stream.finish()):
        recent.extend(result.tokens[-RECENT:].tolist())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in _tokens(stream, max_tokens, sampling, seed, recent):
        shown = stops.feed(decoder.decode(stream.tokenizer.token_bytes(token)))
        if shown:
            yield shown
        if stops.stopped:
            return
    shown = stops.feed(decoder.decode(b"", True))
    shown += "" if stops.stopped else stops.finish()
    if shown:
        yield shown


def _tokens(stream: StreamReader, max_tokens: int, sampling: Sampling, seed: int, recent: deque[int]) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    decoder, begin = Decoder(stream.model, stream.state), stream.tokenizer.begin
    token = stream.last
    for _ in range(max_tokens):
        with torch.inference_mode():
            logits = decoder.step(torch.tensor([token], device=stream.device))[0].float()
            logits[begin] = NEVER
            # A model may know more ids than its tokenizer, where the vocabulary was rounded up.
            logits[stream.tokenizer.vocab_size :] = NEVER
        token = choose(logits, sampling, torch.from_numpy(np.unique(np.asarray(recent, dtype=np.int64))), generator)
        recent.append(token)
        yield token
