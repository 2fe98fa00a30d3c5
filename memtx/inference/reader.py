"""Streaming reader: scores every token of a text of any length at constant memory and constant cost per token."""

from __future__ import annotations

import codecs
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from memtx.data.tokenizers import Tokenizer
from memtx.errors import CheckpointError, DataError, check_at_least
from memtx.inference.batching import ScoreOutput, ScoreRequest, score_segments
from memtx.inference.incremental_tokenizer import IncrementalTokenizer, TokenizedText
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.state import MemoryState
from memtx.word_measure import MAX_WORD_PERPLEXITY, is_word_measure


@dataclass(frozen=True)
class SegmentResult:
    """Scores of the tokens of one segment.

    Attributes:
        tokens: ``(length,)`` int64.
        nll: ``(length,)`` float32, negative log-likelihood of each token in nats, given all tokens before it.
        token_bytes: Bytes of each token in the text.
        start: Position of the first token in the text.
        top_tokens, top_logprobs, hidden_states: As in :class:`~memtx.inference.batching.ScoreOutput`.
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
        """Position after the last token in the text."""
        return self.start + len(self.tokens)


def nats_to_bits_per_byte(nll: float, num_bytes: int) -> float:
    """Return the bits per byte of a text with a total negative log-likelihood of ``nll`` nats; NaN if it is empty."""
    return nll / math.log(2) / num_bytes if num_bytes else math.nan


@dataclass(frozen=True)
class Totals:
    """Sums over the text read so far.

    Attributes:
        nll: Negative log-likelihood of the scored tokens in nats.
        num_tokens: Number of scored tokens.
        num_bytes: Number of UTF-8 bytes fed so far, scored or not.
        num_words: Number of words fed so far, as ``len(text.split())``.
        in_word: If True, the text ends in a word, which more text may continue.
        num_chars: Number of characters fed so far.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    num_words: int = 0
    in_word: bool = False
    num_chars: int = 0

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the text; NaN if it is empty."""
        return nats_to_bits_per_byte(self.nll, self.num_bytes)

    @property
    def word_perplexity(self) -> float:
        """``exp(nll / num_words)``, as for PG-19 (Rae et al. 2019, section 4.1).

        NaN if it means nothing: above ``MAX_WORD_PERPLEXITY``, or if whitespace does not separate words.
        """
        nats_per_word = self.nll / self.num_words if self.num_words else math.inf
        is_meaningful = nats_per_word <= math.log(MAX_WORD_PERPLEXITY) and is_word_measure(
            self.num_words, self.num_bytes
        )
        return math.exp(nats_per_word) if is_meaningful else math.nan

    @property
    def bits_per_character(self) -> float:
        """Bits per character of the text; NaN if it is empty."""
        return nats_to_bits_per_byte(self.nll, self.num_chars)

    def with_text(self, text: str) -> Totals:
        """Return the totals after feeding ``text``."""
        if not text:
            return self
        continues_word = self.in_word and not text[0].isspace()
        num_bytes = self.num_bytes + len(text.encode("utf-8", "surrogatepass"))
        num_words = self.num_words + len(text.split()) - continues_word
        num_chars, in_word = self.num_chars + len(text), not text[-1].isspace()
        return replace(self, num_bytes=num_bytes, num_words=num_words, in_word=in_word, num_chars=num_chars)


@dataclass(frozen=True)
class ReaderSnapshot:
    """Position of a reader in its text, from which it continues exactly.

    Attributes:
        state: State of the model, batch size 1, after all tokens before ``last_token``, the last scored token.
        pending_tokens: ``(length,)`` int64, tokens that do not fill a segment yet.
        pending_text, pending_bytes: Text that is not encoded yet, and bytes of an incomplete character.
        pending_contents: Bytes of the text that each of ``pending_tokens`` stands for.
        incomplete_bytes: Bytes of a character that the tokens begin and do not end.
        parse_special: If True, special tokens in ``pending_text`` are parsed.
    """

    state: MemoryState
    last_token: int | None
    pending_tokens: NDArray[np.int64]
    pending_text: str
    pending_bytes: bytes
    totals: Totals
    pending_contents: tuple[bytes, ...] = ()
    incomplete_bytes: bytes = b""
    parse_special: bool = False


class StreamReader:
    """Reads one text of any length, given in chunks of any size.

    The text is read as ``[bos, tokens...]``, so that its first token is scored too, and in segments of
    ``segment_length`` tokens regardless of the chunks, so that equal texts give bit-identical results. If the tokenizer
    has no begin token, the first token is not scored: its negative log-likelihood is 0.

    Args:
        model: Language model; a module is put into eval mode.
        tokenizer: Tokenizer of the model; raises CheckpointError if it has more tokens than the model.
        segment_length: Tokens per segment, at least 1. Longer segments are faster, with equal results up to rounding.
        score_fn: Function that scores a segment. Defaults to calling the model for this stream alone.
        num_logprobs, return_hidden_states: As in :class:`~memtx.inference.batching.ScoreRequest`.
        parse_special: If True, text that spells a special token becomes that token.
    """

    def __init__(
        self,
        model: RecurrentLanguageModel,
        tokenizer: Tokenizer,
        segment_length: int = 512,
        *,
        score_fn: Callable[[ScoreRequest], ScoreOutput] | None = None,
        num_logprobs: int = 0,
        return_hidden_states: bool = False,
        parse_special: bool = False,
    ) -> None:
        check_at_least(1, segment_length=segment_length)
        if tokenizer.vocab_size > model.vocab_size:
            message = f"The tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}."
            raise CheckpointError(message, "Use the tokenizer that the model was trained with.")
        if isinstance(model, nn.Module):
            model.eval()
        self.model, self.tokenizer, self.segment_length = model, tokenizer, segment_length
        self.score_fn = score_fn or (lambda request: score_segments(model, [request])[0])
        self.num_logprobs, self.return_hidden_states = num_logprobs, return_hidden_states
        # If False, a begin token within the text is like others: in a conversation every turn may begin with it.
        self.splits_documents = True
        self.state = model.init_state(1)
        self.last_token = tokenizer.bos_token_id
        self.totals = Totals()
        self.incomplete_bytes = b""
        self._parse_special = parse_special
        self._pending_tokens = np.empty(0, dtype=np.int64)
        # Bytes of the text of each pending token, the last ones if there are more.
        self._pending_contents: list[bytes] = []
        self._incremental_tokenizer = IncrementalTokenizer(tokenizer, parse_special=parse_special)

    @property
    def parse_special(self) -> bool:
        """If True, text that is fed from now on and spells a special token becomes that token."""
        return self._parse_special

    @parse_special.setter
    def parse_special(self, value: bool) -> None:
        if value == self._parse_special:
            return
        # Pending text is read as it was meant: it is no part of a special token that begins in it.
        self._add_pending(self._incremental_tokenizer.flush())
        self._parse_special = value
        self.restore(self.snapshot())

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.state.position.device

    def _score(self, tokens: NDArray[np.int64], discard_state: bool = False) -> SegmentResult:
        token_bytes = self._take_contents(len(tokens))
        first = [] if self.last_token is None else [self.last_token]
        inputs, labels = np.asarray([*first, *tokens[:-1]], dtype=np.int64), tokens[1 - len(first) :]
        options = (self.num_logprobs, self.return_hidden_states, discard_state, self.tokenizer.vocab_size)
        output = ScoreOutput(self.state, np.zeros(0, dtype=np.float32))
        if len(labels):
            output = self.score_fn(ScoreRequest(self.state, inputs, labels, *options))
        if not first:
            output = _with_unscored_token(output)
        start, nll = self.totals.num_tokens, self.totals.nll + float(output.nll.sum(dtype=np.float64))
        self.state, self.last_token = output.state, int(tokens[-1])
        self.totals = replace(self.totals, nll=nll, num_tokens=start + len(tokens))
        return SegmentResult(
            tokens, output.nll, token_bytes, start, output.top_tokens, output.top_logprobs, output.hidden_states
        )

    def _take_contents(self, count: int) -> list[bytes]:
        """Remove and return the contents of ``count`` tokens that were removed from the pending ones."""
        start = len(self._pending_contents) - len(self._pending_tokens) - count
        contents = self._pending_contents[start : start + count]
        self._pending_contents = self._pending_contents[start + count :]
        return contents

    def _add_pending(self, tokens: TokenizedText) -> None:
        self._pending_tokens = np.concatenate([self._pending_tokens, tokens.ids])
        self._pending_contents += tokens.contents

    def _score_full_segments(self, tokens: TokenizedText) -> Iterator[SegmentResult]:
        self._add_pending(tokens)
        while len(self._pending_tokens) >= self.segment_length:
            yield self._score_next()

    def _score_next(self, discard_state: bool = False) -> SegmentResult:
        """Score the first pending tokens: a segment, which ends before a begin token, or a begin token alone."""
        length = self._next_length(0)
        # A segment is removed, then scored, then returned, so a caller that stops iterating loses nothing.
        segment, self._pending_tokens = np.split(self._pending_tokens, [length])
        if not self.splits_documents or segment[0] not in self.tokenizer.bos_token_ids:
            return self._score(segment, discard_state and not len(self._pending_tokens))
        self.state, self.last_token = self.model.init_state(1), int(segment[0])
        start = self.totals.num_tokens
        self.totals = replace(self.totals, num_tokens=start + 1)
        return SegmentResult(segment, np.zeros(1, dtype=np.float32), self._take_contents(1), start)

    def _next_length(self, start: int) -> int:
        """Return the length of the segment that begins at ``start`` in the pending tokens."""
        tokens = self._pending_tokens[start : start + self.segment_length]
        begins_document = np.isin(tokens, self.tokenizer.bos_token_ids if self.splits_documents else [])
        return max(1, int(begins_document.argmax())) if begins_document.any() else len(begins_document)

    def feed(self, text: str | bytes) -> Iterator[SegmentResult]:
        """Consume text, split anywhere, and yield the segments that it fills; raises DataError if bytes are not UTF-8.

        The text is read as the iterator advances, so exhaust it. If ``text`` has at most
        :data:`~memtx.inference.incremental_tokenizer.CHUNK_SIZE` characters or bytes, the next call or :meth:`finish`
        reads the rest after an early stop.
        """
        for decoded, tokens in self._incremental_tokenizer.feed(text):
            self.totals, self.incomplete_bytes = self.totals.with_text(decoded), b""
            yield from self._score_full_segments(tokens)

    def feed_tokens(self, tokens: Sequence[int]) -> Iterator[SegmentResult]:
        """Consume text as token ids; otherwise like :meth:`feed`.

        The begin token is nothing new at the beginning of the text. Later it begins a new document, which sees nothing
        of the text before it; its own negative log-likelihood is 0. Raises DataError if an id is not in the vocabulary,
        or earlier text is still pending.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        bos_token_id, vocab_size = self.tokenizer.bos_token_id, self.tokenizer.vocab_size
        if (unknown := ids[(ids < 0) | (ids >= vocab_size)]).size:
            raise DataError(f"Token {unknown[0]} is not in the vocabulary of {vocab_size}.", "Check the tokenizer.")
        if self._incremental_tokenizer.pending_text or self._incremental_tokenizer.pending_bytes:
            raise DataError("Tokens follow text that is still pending.", "Call finish() first, or feed text.")
        is_beginning = self.totals.num_tokens == 0 and not len(self._pending_tokens)
        if is_beginning and len(ids) and ids[0] == bos_token_id:
            ids = ids[1:]
        contents = self.tokenizer.token_contents(ids.tolist(), continues=not is_beginning)
        # The tokens may end inside a character, and its replacement has a different number of bytes.
        decoder, num_bytes = codecs.getincrementaldecoder("utf-8")("replace"), sum(map(len, contents))
        totals = self.totals.with_text(decoder.decode(self.incomplete_bytes + b"".join(contents)))
        self.incomplete_bytes = decoder.getstate()[0]
        self.totals = replace(totals, num_bytes=self.totals.num_bytes + num_bytes)
        self._restart_tokenizer(continues=True)
        yield from self._score_full_segments(TokenizedText(ids, contents))

    def begin_with(self, tokens: Sequence[int]) -> None:
        """Begin a text with exactly these tokens: with the begin token only if it is the first of them."""
        if self.totals.num_tokens == 0 and list(tokens[:1]) != [self.tokenizer.bos_token_id]:
            self.last_token = None

    def finish(self, *, discard_state: bool = False) -> Iterator[SegmentResult]:
        """End the text and yield the pending segments; the last may be shorter than ``segment_length``.

        With ``discard_state``, the state is not updated and the reader cannot be used afterwards. Raises DataError if
        the text ends inside a character.
        """
        yield from self._score_full_segments(self._incremental_tokenizer.finish())
        while len(self._pending_tokens):
            yield self._score_next(discard_state)

    def consume(self, prompt: str | bytes | Sequence[int]) -> NDArray[np.int64]:
        """Consume text or token ids to their end without scoring; return all pending tokens, for :meth:`finish`.

        Raises DataError like :meth:`feed` and :meth:`feed_tokens`, and leaves the reader unchanged then.
        """
        fork = self.fork()
        fork.segment_length = sys.maxsize  # No segment is full.
        for _ in fork.feed(prompt) if isinstance(prompt, str | bytes) else fork.feed_tokens(prompt):
            pass
        for _ in fork._score_full_segments(fork._incremental_tokenizer.finish()):
            pass
        self.restore(fork.snapshot())
        return self._pending_tokens

    def segment_ends(self) -> list[int]:
        """Return the number of pending tokens up to the end of each segment that :meth:`finish` will score."""
        ends = [0]
        while ends[-1] < len(self._pending_tokens):
            ends.append(ends[-1] + self._next_length(ends[-1]))
        return ends[1:]

    def skip(self, snapshot: ReaderSnapshot) -> None:
        """Continue after the first pending tokens, with a snapshot of a reader that has read exactly these."""
        num_tokens, device = snapshot.totals.num_tokens, self.device
        self.state, self.last_token = snapshot.state.to(device), snapshot.last_token
        self._pending_tokens = self._pending_tokens[num_tokens - self.totals.num_tokens :]
        self.totals = replace(self.totals, nll=snapshot.totals.nll, num_tokens=num_tokens)

    def snapshot(self) -> ReaderSnapshot:
        """Return the current position for :meth:`restore`, without copying."""
        text, content = self._incremental_tokenizer.pending_text, self._incremental_tokenizer.pending_bytes
        contents = tuple(self._pending_contents[len(self._pending_contents) - len(self._pending_tokens) :])
        values = (self._pending_tokens, text, content, self.totals, contents, self.incomplete_bytes, self.parse_special)
        return ReaderSnapshot(self.state, self.last_token, *values)

    def restore(self, snapshot: ReaderSnapshot) -> None:
        """Restore a snapshot of a reader with the same model and tokenizer."""
        self.state, self.last_token, self.totals = snapshot.state, snapshot.last_token, snapshot.totals
        self._pending_tokens, self._pending_contents = snapshot.pending_tokens, list(snapshot.pending_contents)
        self.incomplete_bytes, self._parse_special = snapshot.incomplete_bytes, snapshot.parse_special
        continues = bool(snapshot.totals.num_tokens or len(snapshot.pending_tokens))
        text, content = snapshot.pending_text, snapshot.pending_bytes
        self._restart_tokenizer(continues=continues, pending_text=text, pending_bytes=content)

    def _restart_tokenizer(self, *, continues: bool, pending_text: str = "", pending_bytes: bytes = b"") -> None:
        self._incremental_tokenizer = IncrementalTokenizer(
            self.tokenizer,
            pending_text=pending_text,
            pending_bytes=pending_bytes,
            # The totals do not count the bytes of an incomplete character.
            bytes_consumed=self.totals.num_bytes + len(pending_bytes),
            continues=continues,
            parse_special=self._parse_special,
        )

    def fork(self) -> StreamReader:
        """Return an independent reader at the same position, which shares the model."""
        fork = copy.copy(self)
        fork.restore(self.snapshot())
        return fork


def _with_unscored_token(output: ScoreOutput) -> ScoreOutput:
    """Return the output with one more token at the start, whose scores are 0."""

    def pad(values: NDArray[Any] | None) -> Any:
        return (
            None
            if values is None
            else np.concatenate([np.zeros_like(values[:1], shape=(1, *values.shape[1:])), values])
        )

    scores = {name: pad(getattr(output, name)) for name in ("nll", "top_tokens", "top_logprobs", "hidden_states")}
    return replace(output, **scores)
