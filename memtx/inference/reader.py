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
from memtx.inference.incremental_tokenizer import IncrementalTokenizer
from memtx.inference.scoring import ScoreOutput, ScoreRequest, score_segments
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
        top_tokens: where asked for, (n, num_logprobs) int64, the likeliest tokens at each place, likeliest first.
        top_logprobs: likewise their log-probabilities, (n, num_logprobs) float32, in nats.
        hidden_states: where asked for, (n, dim) float32, the last layer's output that each token was predicted from: it
            knows all before the token, not the token.
    """

    tokens: NDArray[np.int64]
    nll: NDArray[np.float32]
    token_bytes: list[bytes]
    start: int
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    hidden_states: NDArray[np.float32] | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Totals:
    """Sums over all that was scored; ``num_words`` and ``num_bytes`` count the raw text that was fed.

    Attributes:
        nll: nats.
        num_tokens: scored tokens.
        num_bytes: bytes of the text in UTF-8.
        num_words: runs of anything but white space, as ``len(text.split())``.
        in_word: the text fed so far ends inside a word, so its next part may go on with it.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    num_words: int = 0
    in_word: bool = False

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text; NaN for no text."""
        return self.nll / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    @property
    def word_perplexity(self) -> float:
        """``exp(nll / num_words)`` as for PG-19 (Rae et al. 2019, section 4.1); inf past the largest float."""
        if not self.num_words:
            return math.nan
        try:
            return math.exp(self.nll / self.num_words)
        except OverflowError:
            return math.inf

    def with_text(self, text: str) -> Totals:
        """Return the sums after ``text`` was fed."""
        if not text:
            return self
        joined = self.in_word and not text[0].isspace()
        return replace(
            self,
            num_bytes=self.num_bytes + len(text.encode("utf-8", "surrogatepass")),
            num_words=self.num_words + len(text.split()) - joined,
            in_word=not text[-1].isspace(),
        )


@dataclass(frozen=True)
class ReaderSnapshot:
    """Where a stream stands: a value, so taking one costs nothing and going back to it is exact.

    Attributes:
        state: the model's, one row.
        last_token: the newest token that was scored; the model has seen all before it.
        pending_tokens: (n,) int64, tokens that wait for their segment to fill.
        pending_text: text that is not encoded yet.
        pending_bytes: the beginning of a character whose rest has not come.
        totals: sums so far.
    """

    state: MemoryState
    last_token: int
    pending_tokens: NDArray[np.int64]
    pending_text: str
    pending_bytes: bytes
    totals: Totals


class StreamReader:
    """Reads one text of any length with constant memory.

    How the text is cut does not matter: segments fill up to ``segment_length`` tokens whatever arrives, so equal
    texts give equal numbers, bit for bit.

    Args:
        model: put into eval mode here.
        tokenizer: the one the model was trained with.
        segment_length: tokens a segment; more is faster, and all give the same numbers up to rounding.
        score_fn: what reads a segment; by default the model itself, for this stream alone.
        num_logprobs: how many of the likeliest tokens to name at every place.
        return_hidden_states: whether to hand out hidden states.

    Raises:
        MemtxError: ``segment_length`` is not positive.
        CheckpointError: the tokenizer has ids that the model does not know.
    """

    def __init__(
        self,
        model: MemoryTransformer,
        tokenizer: Tokenizer,
        segment_length: int = 512,
        *,
        score_fn: Callable[[ScoreRequest], ScoreOutput] | None = None,
        num_logprobs: int = 0,
        return_hidden_states: bool = False,
    ) -> None:
        if segment_length < 1:
            raise MemtxError(f"The segment is {segment_length} tokens, expected at least 1.")
        if tokenizer.vocab_size > model.vocab_size:
            raise CheckpointError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, the model knows {model.vocab_size}.",
                "Use the tokenizer that the model was trained with.",
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.segment_length = segment_length
        self.score_fn = score_fn or (lambda reading: score_segments(model, [reading])[0])
        self.num_logprobs = num_logprobs
        self.return_hidden_states = return_hidden_states
        self.state = model.init_state(1)
        self.last_token = tokenizer.bos_token_id
        self.totals = Totals()
        self._pending_tokens = np.empty(0, dtype=np.int64)
        self._incremental_tokenizer = IncrementalTokenizer(tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.state.position.device

    def _score(self, tokens: NDArray[np.int64], discard_state: bool = False) -> SegmentResult:
        inputs = np.concatenate([np.asarray([self.last_token], dtype=np.int64), tokens[:-1]])
        scored = self.score_fn(
            ScoreRequest(self.state, inputs, tokens, self.num_logprobs, self.return_hidden_states, discard_state)
        )
        self.state = scored.state
        result = SegmentResult(
            tokens,
            scored.nll,
            [self.tokenizer.token_bytes(int(token)) for token in tokens],
            self.totals.num_tokens,
            scored.top_tokens,
            scored.top_logprobs,
            scored.hidden_states,
        )
        self.last_token = int(tokens[-1])
        self.totals = replace(
            self.totals,
            nll=self.totals.nll + float(scored.nll.sum(dtype=np.float64)),
            num_tokens=self.totals.num_tokens + len(tokens),
        )
        return result

    def _score_full_segments(self, tokens: NDArray[np.int64]) -> Iterator[SegmentResult]:
        self._pending_tokens = np.concatenate([self._pending_tokens, tokens])
        while len(self._pending_tokens) >= self.segment_length:
            # Taken out before it is scored, and scored before it is shown: whoever stops listening loses nothing.
            tokens, self._pending_tokens = (
                self._pending_tokens[: self.segment_length],
                self._pending_tokens[self.segment_length :],
            )
            yield self._score(tokens)

    def feed(self, text: str | bytes) -> Iterator[SegmentResult]:
        """Take more of the text and yield the segments that it fills.

        An iterator: the text is read as the results are taken, so take them all. Of a text of at most
        ``pieces.CHUNK_SIZE`` characters or bytes, what was not taken waits for the next call, or for :meth:`finish`.

        Args:
            text: any amount, cut anywhere; bytes are UTF-8.

        Raises:
            DataError: bytes that are not UTF-8.
        """
        for decoded, tokens in self._incremental_tokenizer.feed(text):
            self.totals = self.totals.with_text(decoded)
            yield from self._score_full_segments(tokens)

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
        if (ids == self.tokenizer.bos_token_id).any():
            raise DataError(f"Token {self.tokenizer.bos_token_id} begins a document and is no text.", "Leave it out.")
        if self._incremental_tokenizer.pending_text or self._incremental_tokenizer.pending_bytes:
            raise DataError("Tokens follow a text that was not ended.", "Finish it first, or give text.")
        content = b"".join(self.tokenizer.token_bytes(int(token)) for token in ids)
        # A character may be cut by the end of the tokens, so what it decodes to has other bytes.
        counted = self.totals.with_text(content.decode("utf-8", "replace"))
        self.totals = replace(counted, num_bytes=self.totals.num_bytes + len(content))
        yield from self._score_full_segments(ids)

    def finish(self, *, discard_state: bool = False) -> Iterator[SegmentResult]:
        """End the text: yield what waited, the last segment shorter than the others.

        Args:
            discard_state: nothing will be read or generated from here, so the state need not be kept up; the reader is
                of no further use.

        Raises:
            DataError: the text ends inside a character.
        """
        yield from self._score_full_segments(self._incremental_tokenizer.finish())
        if len(self._pending_tokens):
            tokens, self._pending_tokens = self._pending_tokens, self._pending_tokens[:0]
            yield self._score(tokens, discard_state)

    def snapshot(self) -> ReaderSnapshot:
        """Return where the stream stands, to :meth:`restore` it; nothing is copied."""
        return ReaderSnapshot(
            self.state,
            self.last_token,
            self._pending_tokens,
            self._incremental_tokenizer.pending_text,
            self._incremental_tokenizer.pending_bytes,
            self.totals,
        )

    def restore(self, snapshot: ReaderSnapshot) -> None:
        """Go to where a snapshot of this model and tokenizer was taken."""
        self.state = snapshot.state
        self.last_token = snapshot.last_token
        self.totals = snapshot.totals
        self._pending_tokens = snapshot.pending_tokens
        self._incremental_tokenizer = IncrementalTokenizer(
            self.tokenizer,
            pending_text=snapshot.pending_text,
            pending_bytes=snapshot.pending_bytes,
            # A character's bytes are taken before they count as text.
            bytes_consumed=snapshot.totals.num_bytes + len(snapshot.pending_bytes),
        )

    def fork(self) -> StreamReader:
        """Return a second reader that goes on from here by itself; the weights are shared."""
        other = copy.copy(self)
        other.restore(self.snapshot())
        return other
