"""Going on with a text: one token after the other from a state, so a book that was read is not read again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch

from memtx.data.tokenizers import Tokenizer
from memtx.inference.decoder import Decoder
from memtx.inference.reader import SegmentResult, StreamReader
from memtx.inference.sampling import SamplingParams
from memtx.inference.token_generator import REPETITION_WINDOW, GenerationConfig, TokenGenerator
from memtx.models.memory_transformer import MemoryTransformer


def generate(
    model: MemoryTransformer,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    reader: StreamReader | None = None,
    segment_length: int = 512,
    max_tokens: int = 256,
    sampling_params: SamplingParams | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Yield the continuation of a text, piece by piece, as soon as its characters are whole.

    Args:
        model: put into eval mode.
        tokenizer: the one the model was trained with.
        prompt: of any length; read in segments. It goes on where ``reader`` stands, if one is given.
        reader: a stream that was read; stays as it is.
        segment_length: tokens a segment while the prompt is read, without ``reader``.
        max_tokens: tokens made at most.
        sampling_params: how each token is chosen; plain sampling by default.
        stop: texts that end it; they are not shown.
        seed: equal seeds give equal texts (on one machine and build of torch).

    Returns:
        An iterator over pieces of text, none of them empty.

    Raises:
        MemtxError: a negative ``max_tokens``, an empty stop string, or logits that are not finite.
    """
    # Checked here and not in the generator, which runs only when the first piece is asked for.
    request = GenerationConfig(max_tokens, sampling_params or SamplingParams(), tuple(stop), seed)
    stream = reader.fork() if reader is not None else StreamReader(model, tokenizer, segment_length)
    return _generate(stream, prompt, request)


def collect_recent_tokens(results: Iterable[SegmentResult]) -> list[int]:
    """Return the last tokens of what was read, as many as the repetition penalty looks back at."""
    recent: deque[int] = deque(maxlen=REPETITION_WINDOW)
    for result in results:
        recent.extend(result.tokens[-REPETITION_WINDOW:].tolist())
    return list(recent)


def _generate(reader: StreamReader, prompt: str, config: GenerationConfig) -> Iterator[str]:
    recent = collect_recent_tokens(chain(reader.feed(prompt), reader.finish()))
    text = TokenGenerator(reader.tokenizer, reader.last_token, recent, config)
    decoder = Decoder(reader.model, reader.state)
    while text.finish_reason is None:
        piece = text.advance(decoder.step(torch.tensor([text.next_token], device=reader.device))[0])
        if piece.text:
            yield piece.text
