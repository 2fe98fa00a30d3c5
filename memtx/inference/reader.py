"""Reading a stream: text in any pieces goes in, how surprising every token was comes out.

The first token is scored too: a document is fed as [begin, tokens...]. Memory and the cost of a token stay the
same however much was read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError, MemtxError
from memtx.inference.pieces import TextPieces
from memtx.inference.scoring import Reading, Scored, score
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState


@dataclass(frozen=True)
class SegmentResult:
    """What one segment said.

    Attributes:
        tokens: (n,) int64.
        nll: (n,) float32, the surprise of each token: its negative log-likelihood in nats, given all before it.
        token_bytes: what each token stands for in the text, n of them.
        start: position in the text of the first token, counted in tokens from 0.
        top_tokens: where asked for, (n, top) int64, the likeliest tokens at each place, likeliest first.
        top_logprobs: likewise their log-probabilities, (n, top) float32, in nats.
        embeddings: where asked for, (n, dim) float32, the last layer's output that each token was predicted from: it
            knows all before the token, not the token.
    """

    tokens: NDArray[np.int64]
    nll: NDArray[np.float32]
    token_bytes: list[bytes]
    start: int
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    embeddings: NDArray[np.float32] | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Totals:
    """Sums over all that was scored; ``words`` and ``bytes`` count the raw text that was fed.

    Attributes:
        nll: nats.
        tokens: scored tokens.
        bytes: bytes of the text in UTF-8.
        words: runs of anything but white space, as ``len(text.split())``.
        in_word: the text fed so far ends inside a word, so its next part may go on with it.
    """

    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    in_word: bool = False

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text; NaN for no text."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def word_perplexity(self) -> float:
        """``exp(nll / words)`` as for PG-19 (Rae et al. 2019, section 4.1); inf past the largest float."""
        if not self.words:
            return math.nan
        try:
            return math.exp(self.nll / self.words)
        except OverflowError:
            return math.inf

    def with_text(self, text: str) -> Totals:
        """Return the sums after ``text`` was fed."""
        if not text:
            return self
        joined = self.in_word and not text[0].isspace()
        return replace(
            self,
            bytes=self.bytes + len(text.encode("utf-8", "surrogatepass")),
            words=self.words + len(text.split()) - joined,
            in_word=not text[-1].isspace(),
        )


@dataclass(frozen=True)
class Snapshot:
    """Where a stream stands: a value, so taking one costs nothing and going back to it is exact.

    Attributes:
        state: the model's, one row.
        last: the newest token that was scored; the model has seen all before it.
        pending: (n,) int64, tokens that wait for their segment to fill.
        waiting: text that is not encoded yet.
        waiting_bytes: the beginning of a character whose rest has not come.
        totals: sums so far.
    """

    state: MemoryState
    last: int
    pending: NDArray[np.int64]
    waiting: str
    waiting_bytes: bytes
    totals: Totals


class StreamReader:
    """Reads one text of any length with constant memory.

    How the text is cut does not matter: segments fill up to ``segment`` tokens whatever arrives, so equal
    texts give equal numbers, bit for bit.

    Args:
        model: put into eval mode here.
        tokenizer: the one the model was trained with.
        segment: tokens a segment; more is faster, and all give the same numbers up to rounding.
        scorer: what reads a segment; by default the model itself, for this stream alone.
        top: how many of the likeliest tokens to name at every place.
        embeddings: whether to hand out hidden states.

    Raises:
        MemtxError: ``segment`` is not positive.
        CheckpointError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        tokenizer: Tokenizer,
        segment: int = 512,
        *,
        scorer: Callable[[Reading], Scored] | None = None,
        top: int = 0,
        embeddings: bool = False,
    ) -> None:
        if segment < 1:
            raise MemtxError(f"The segment is {segment} tokens, expected at least 1.")
        if tokenizer.vocab_size > model.vocab_size:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model knows {model.vocab_size}.",
                "Use the tokenizer that the model was trained with.",
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.segment = segment
        self.scorer = scorer or (lambda reading: score(model, [reading])[0])
        self.top = top
        self.embeddings = embeddings
        self.state = model.init_state(1)
        self.last = tokenizer.begin
        self.totals = Totals()
        self._pending = np.empty(0, dtype=np.int64)
        self._pieces = TextPieces(tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.state.position.device

    def _score(self, tokens: NDArray[np.int64], last: bool = False) -> SegmentResult:
        inputs = np.concatenate([np.asarray([self.last], dtype=np.int64), tokens[:-1]])
        scored = self.scorer(Reading(self.state, inputs, tokens, self.top, self.embeddings, last))
        self.state = scored.state
        result = SegmentResult(
            tokens,
            scored.nll,
            [self.tokenizer.token_bytes(int(token)) for token in tokens],
            self.totals.tokens,
            scored.top_tokens,
            scored.top_logprobs,
            scored.embeddings,
        )
        self.last = int(tokens[-1])
        self.totals = replace(
            self.totals,
            nll=self.totals.nll + float(scored.nll.sum(dtype=np.float64)),
            tokens=self.totals.tokens + len(tokens),
        )
        return result

    def _full_segments(self, tokens: NDArray[np.int64]) -> Iterator[SegmentResult]:
        self._pending = np.concatenate([self._pending, tokens])
        while len(self._pending) >= self.segment:
            # Taken out before it is scored, and scored before it is shown: whoever stops listening loses nothing.
            tokens, self._pending = self._pending[: self.segment], self._pending[self.segment :]
            yield self._score(tokens)

    def feed(self, text: str | bytes) -> Iterator[SegmentResult]:
        """Take more of the text and yield the segments that it fills.

        An iterator: the text is read as the results are taken, so take them all. Of a text of at most
        ``pieces.STEP`` characters or bytes, what was not taken waits for the next call, or for :meth:`finish`.

        Args:
            text: any amount, cut anywhere; bytes are UTF-8.

        Raises:
            DataError: bytes that are not UTF-8.
        """
        for decoded, tokens in self._pieces.feed(text):
            self.totals = self.totals.with_text(decoded)
            yield from self._full_segments(tokens)

    def feed_tokens(self, tokens: Sequence[int]) -> Iterator[SegmentResult]:
        """Take text as tokens; like :meth:`feed` in all else.

        Raises:
            DataError: an id that is not of the tokenizer's or that stands for no text; or text that was fed before
                still waits for its rest.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if unknown := [int(one) for one in ids if not 0 <= one < self.tokenizer.vocab_size]:
            raise DataError(
                f"Token {unknown[0]} is not in the vocabulary of {self.tokenizer.vocab_size}.", "Check the tokenizer."
            )
        if (ids == self.tokenizer.begin).any():
            raise DataError(f"Token {self.tokenizer.begin} begins a document and is no text.", "Leave it out.")
        if self._pieces.waiting or self._pieces.waiting_bytes:
            raise DataError("Tokens follow a text that was not ended.", "Finish it first, or give text.")
        content = b"".join(self.tokenizer.token_bytes(int(token)) for token in ids)
        # A character may be cut by the end of the tokens, so what it decodes to has other bytes.
        counted = self.totals.with_text(content.decode("utf-8", "replace"))
        self.totals = replace(counted, bytes=self.totals.bytes + len(content))
        yield from self._full_segments(ids)

    def finish(self, *, last: bool = False) -> Iterator[SegmentResult]:
        """End the text: yield what waited, the last segment shorter than the others.

        Args:
            last: nothing will be read or generated from here, so the state need not be kept up; the reader is of no
                further use.

        Raises:
            DataError: the text ends inside a character.
        """
        yield from self._full_segments(self._pieces.finish())
        if len(self._pending):
            tokens, self._pending = self._pending, self._pending[:0]
            yield self._score(tokens, last)

    def snapshot(self) -> Snapshot:
        """Return where the stream stands, to :meth:`restore` it; nothing is copied."""
        return Snapshot(
            self.state, self.last, self._pending, self._pieces.waiting, self._pieces.waiting_bytes, self.totals
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where a snapshot of this model and tokenizer was taken."""
        self.state = snapshot.state
        self.last = snapshot.last
        self.totals = snapshot.totals
        self._pending = snapshot.pending
        self._pieces = TextPieces(
            self.tokenizer,
            waiting=snapshot.waiting,
            waiting_bytes=snapshot.waiting_bytes,
            # A character's bytes are taken before they count as text.
            taken_bytes=snapshot.totals.bytes + len(snapshot.waiting_bytes),
        )

    def fork(self) -> StreamReader:
        """Return a second reader that goes on from here by itself; the weights are shared."""
        other = copy.copy(self)
        other.restore(self.snapshot())
        return other
