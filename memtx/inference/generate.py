"""Going on with a text: one token after the other from a state, so a book that was read is not read again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch

from memtx.data.tokenizers import Tokenizer
from memtx.inference.continuation import RECENT, Continuation, Request
from memtx.inference.decoder import Decoder
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import Sampling
from memtx.models.memory_transformer import MemoryTransformer


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
    request = Request(max_tokens, sampling or Sampling(), tuple(stop), seed)
    stream = reader.fork() if reader is not None else StreamReader(model, tokenizer, segment)
    return _pieces(stream, prompt, request)


def newest_tokens(results: Iterable[SegmentResult]) -> list[int]:
    """Return the last tokens of what was read, as many as the repetition penalty looks back at."""
    recent: deque[int] = deque(maxlen=RECENT)
    for result in results:
        recent.extend(result.tokens[-RECENT:].tolist())
    return list(recent)


def _pieces(stream: StreamReader, prompt: str, request: Request) -> Iterator[str]:
    recent = newest_tokens(chain(stream.feed(prompt), stream.finish()))
    text = Continuation(stream.tokenizer, stream.last, recent, request)
    decoder = Decoder(stream.model, stream.state)
    while text.finish is None:
        piece = text.advance(decoder.step(torch.tensor([text.token], device=stream.device))[0])
        if piece.text:
            yield piece.text
