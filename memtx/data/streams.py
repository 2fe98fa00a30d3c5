"""Streams of whole documents as batches: a plan is a function of seed and lengths, a batch one of plan and step.

Every rank computes the same plan of all ranks' streams, so no document is read twice and no plan is communicated. A
position in the data is a few integers, equal on all ranks, and resuming sets them.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX, Batch, FixedBatches, ResumableBatches
from memtx.data.shards import TokenStore
from memtx.errors import CheckpointError, DataError


class StreamPlan:
    """The documents of each stream, in order. An offset counts the tokens of a stream before a position."""

    def __init__(self, num_streams: int) -> None:
        # Of each stream's documents: the ascending offset of the start, the index, and the first token that the stream
        # reads, 0 unless another stream began the document.
        self.documents: list[list[tuple[int, int, int]]] = [[] for _ in range(num_streams)]
        # End of each stream's last document so far, and a heap of the same, the earliest first.
        self.end_offsets = [0] * num_streams
        self._end_heap = [(0, stream) for stream in range(num_streams)]

    def append(self, document: int, length: int, first_token: int = 0) -> None:
        """Append a document, from token ``first_token`` on, to the stream that ends earliest."""
        end_offset, stream = self._end_heap[0]
        self.documents[stream].append((end_offset, document, first_token))
        self.end_offsets[stream] = end_offset + length - first_token
        heapq.heapreplace(self._end_heap, (self.end_offsets[stream], stream))

    def iter_documents(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of a stream within offsets ``start`` to ``stop``: index, start offset, first token."""
        documents, offset_of = self.documents[stream], operator.itemgetter(0)
        first = max(0, bisect.bisect_right(documents, start, key=offset_of) - 1)
        end = bisect.bisect_left(documents, stop, first, key=offset_of)
        for start_offset, document, first_token in documents[first:end]:
            yield document, start_offset, first_token


class EndlessStreamPlan(StreamPlan):
    """The plan of training: a free stream takes the next document of a shuffled pass, and passes follow one another.

    Every pass holds each document once, over the streams of all ranks; its order is a function of seed and pass.
    ``lengths`` is ``(documents,)``, the tokens of each document.
    """

    def __init__(self, lengths: NDArray[np.int64], num_streams: int, seed: int) -> None:
        super().__init__(num_streams)
        self._lengths, self._seed = lengths, seed
        self._pass_index = 0
        self._remaining: list[tuple[int, int]] = []  # unassigned documents and their first tokens, the next one last

    def extend_to(self, offset: int) -> None:
        """Extend the plan until every stream has documents up to an offset; earlier assignments stay."""
        while self._end_heap[0][0] < offset:
            if not self._remaining:
                order = np.random.default_rng([self._seed, self._pass_index]).permutation(len(self._lengths))
                self._remaining = [(document, 0) for document in order[::-1].tolist()]
                self._pass_index += 1
            document, first_token = self._remaining.pop()
            self.append(document, int(self._lengths[document]), first_token)

    def reassign(self, num_streams: int, offset: int) -> EndlessStreamPlan:
        """Return a plan that assigns what is left from an offset on to another number of streams.

        Every token is in one of the two plans, and offsets continue. The first streams continue where they are. A new
        stream takes the next document. Documents that removed streams have not finished come next, before those that
        nobody began.
        """
        self.extend_to(offset)
        plan = EndlessStreamPlan(self._lengths, num_streams, self._seed)
        plan._pass_index, plan._remaining = self._pass_index, list(self._remaining)
        for stream in range(num_streams):
            plan.end_offsets[stream] = offset
            if stream < len(self.end_offsets) and self.end_offsets[stream] > offset:
                plan.documents[stream] = self.documents[stream][-1:]
                plan.end_offsets[stream] = self.end_offsets[stream]
        # In reverse, since the next document is last.
        for stream in reversed(range(num_streams, len(self.end_offsets))):
            if self.end_offsets[stream] > offset:
                start_offset, document, first_token = self.documents[stream][-1]
                plan._remaining.append((document, offset - start_offset + first_token))
        plan._end_heap = [(end, stream) for stream, end in enumerate(plan.end_offsets)]
        heapq.heapify(plan._end_heap)
        return plan


def pack_documents(lengths: NDArray[np.int64], num_streams: int) -> StreamPlan:
    """Return a plan that reads each document once: longest first, each in the stream that ends earliest."""
    plan = StreamPlan(num_streams)
    for document in np.argsort(-lengths, kind="stable").tolist():
        plan.append(document, int(lengths[document]))
    return plan


def read_batch(
    store: TokenStore, plan: StreamPlan, streams: Sequence[int], start: int, stop: int, end_offset: int
) -> Batch:
    """Return offsets ``start`` to ``stop`` of some streams of a plan, in this order.

    Positions past the end of a stream, or from ``end_offset`` on, are padding: each is ``bos_token_id`` (or 0) with a
    document start of its own and no label, so it changes nothing before it and is counted nowhere. An endless plan must
    reach ``stop``.
    """
    shape = len(streams), stop - start
    tokens, labels = (
        np.full(shape, store.bos_token_id or 0, dtype=np.int64),
        np.full(shape, IGNORE_INDEX, dtype=np.int64),
    )
    document_starts = np.ones(shape, dtype=np.bool_)
    num_words, num_bytes = np.zeros(len(streams), dtype=np.int64), np.zeros(len(streams), dtype=np.int64)
    for row, stream in enumerate(streams):
        for span in iter_spans(store, plan, stream, start, min(stop, end_offset)):
            # One token more than is read: the last label, if the document continues.
            text = store.slice_tokens(span.document, span.first, span.end + 1)
            num_tokens = int(store.lengths[span.document])
            count = span.end - span.first
            num_labels = count - 1 if span.end == num_tokens else len(text) - 1
            tokens[row, span.position : span.position + count] = text[:count]
            labels[row, span.position : span.position + num_labels] = text[1 : 1 + num_labels]
            document_starts[row, span.position : span.position + count] = False
            document_starts[row, span.position] = span.is_start
            label_range = span.first, span.first + num_labels, num_tokens - 1
            num_words[row] += _prorate(int(store.num_words[span.document]), *label_range)
            num_bytes[row] += _prorate(int(store.num_bytes[span.document]), *label_range)
    return Batch(*map(torch.from_numpy, (tokens, labels, document_starts, num_words, num_bytes)))


class Span(NamedTuple):
    """Tokens of one document in a stream's part of a batch."""

    document: int  # index
    position: int  # in the batch, of the first token
    first: int  # token of the document
    end: int  # token after the last
    is_start: bool  # True if the stream starts the document here


def iter_spans(store: StreamStore, plan: StreamPlan, stream: int, start: int, stop: int) -> Iterator[Span]:
    """Yield the spans that a stream reads between two offsets."""
    for document, start_offset, first_token in plan.iter_documents(stream, start, stop):
        # Offset of the document's token 0, if the stream had read it from there.
        zero_offset = start_offset - first_token
        first = max(start - zero_offset, first_token)
        end = min(stop - zero_offset, int(store.lengths[document]))
        if first < end:
            yield Span(document, zero_offset + first - start, first, end, first == first_token)


def _prorate(amount: int, start: int, stop: int, count: int) -> int:
    """Return the share of ``amount``, spread over ``count`` tokens, in tokens ``start`` to ``stop``; sums are exact."""
    return amount * stop // count - amount * start // count if count else 0


def _rank_streams(batch_size: int, length: int, rank: int, world_size: int) -> range:
    """Return the streams of a rank; raises DataError if a number is out of range."""
    for name, value in (("batch_size", batch_size), ("length", length), ("world_size", world_size)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, expected 0 to {world_size - 1}.")
    return range(rank * batch_size, (rank + 1) * batch_size)


class StreamStore(Protocol):
    """Documents, or other sequences, that streams are made of."""

    lengths: NDArray[np.int64]  # (documents,), tokens or steps of each
    fingerprint: str  # SHA-256 of the content

    @property
    def num_tokens(self) -> int:
        """Sum of the lengths."""


S = TypeVar("S", bound=StreamStore)
B = TypeVar("B")


class EndlessStreams(ResumableBatches, Generic[S]):
    """Endless streams of whole documents for training, with a position that can be set.

    Streams continue across batches, epochs and passes; no token is dropped and none is padding. Resumed with another
    number of streams, on any number of ranks, what is left is assigned to these, and every token is still read once a
    pass (:meth:`EndlessStreamPlan.reassign`). Raises DataError if a number is out of range.

    Args:
        store: Tokens of the documents.
        batch_size: Number of streams of this rank.
        length: Tokens of a stream in a batch.
        seed: Seed of the shuffles.
        rank: Rank of this process, whose streams are ``rank * batch_size`` and on.
        world_size: Number of processes, which together read each document once a pass.
        steps_per_epoch: Batches of an epoch. None takes one pass: total tokens // (all streams * length).

    Attributes:
        resume_message: Sentence on what a resume with other streams means; empty if they are the same.
    """

    def __init__(
        self,
        store: S,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps_per_epoch: int | None = None,
    ) -> None:
        self._streams = _rank_streams(batch_size, length, rank, world_size)
        if steps_per_epoch is None:
            steps_per_epoch = max(1, store.num_tokens // (batch_size * world_size * length))
        elif steps_per_epoch < 1:
            raise DataError(f"steps_per_epoch is {steps_per_epoch}, expected at least 1.")
        super().__init__(steps_per_epoch)
        self.store, self.batch_size, self.length, self.seed = store, batch_size, length, seed
        self.world_size = world_size
        self._plan = EndlessStreamPlan(store.lengths, batch_size * world_size, seed)
        self.resume_message = ""
        # Earlier numbers of streams, each with the offset up to which it was read.
        self._assignments: list[tuple[int, int]] = []
        self._resume_step, self._resume_offset = 0, 0  # a batch, and the offset at which it starts

    def _offset_at(self, step: int) -> int:
        return self._resume_offset + (step - self._resume_step) * self.length

    def _extend_to(self, step: int) -> tuple[int, int]:
        """Extend the plan to the end of a step and return the step's first offset and the one after its last."""
        start, stop = self._offset_at(step), self._offset_at(step + 1)
        self._plan.extend_to(stop)
        return start, stop

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what identifies the data."""
        return {
            "position": self.position,
            "steps_per_epoch": self.steps_per_epoch,
            "offset": self._offset_at(self.position),
            "seed": self.seed,
            "global_batch_size": self.batch_size * self.world_size,
            "length": self.length,
            "assignments": [list(assignment) for assignment in self._assignments],
            "corpus": self.store.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any], accumulate_grad_batches: int = 1) -> None:
        """Go to a saved position.

        With other streams or another length, the rest of the epoch has another number of batches, and the position
        counts these, rounded up to a multiple of ``accumulate_grad_batches``, the batches of an optimizer step. Raises
        CheckpointError if it is in other data: another corpus or tokenizer, or another seed.
        """
        current = self.state_dict()
        corpus_hint = "Give the texts and the tokenizer of the checkpoint, or start a new run from its weights."
        hints = {"corpus": corpus_hint, "seed": "Resume with the checkpoint's seed."}
        for key, hint in hints.items():
            if state_dict.get(key, current[key]) != current[key]:
                saved_value, value = (str(position[key])[:20] for position in (state_dict, current))
                message = f"The checkpoint's data position belongs to {key} {saved_value}, this run has {value}."
                raise CheckpointError(message, hint)
        saved = {**current, "assignments": [], **state_dict}
        offset = state_dict.get("offset", saved["position"] * saved["length"])
        self._assignments = [(num_streams, until) for num_streams, until in saved["assignments"]]
        plan = self._build_plan([*self._assignments, (saved["global_batch_size"], offset)])
        self.resume_message = ""
        if saved["global_batch_size"] != (num_streams := current["global_batch_size"]):
            self._assignments.append((saved["global_batch_size"], offset))
            self.resume_message = _describe_reassignment(plan, num_streams, offset)
            plan = plan.reassign(num_streams, offset)
        self._plan = plan
        self.position = _convert_position(saved, current, accumulate_grad_batches)
        self._resume_step, self._resume_offset = self.position, offset

    def resize(self, batch_size: int, length: int, accumulate_grad_batches: int = 1) -> None:
        """Go on with other batches from the current position, in epochs of as many batches as before.

        What is left is assigned to the new number of streams as when a run resumes.
        """
        if (batch_size, length) == (self.batch_size, self.length):
            return
        state, rank = self.state_dict(), self._streams.start // self.batch_size
        self._streams = _rank_streams(batch_size, length, rank, self.world_size)
        self.batch_size, self.length = batch_size, length
        self.load_state_dict(state, accumulate_grad_batches)

    def _build_plan(self, assignments: Sequence[tuple[int, int]]) -> EndlessStreamPlan:
        """Return the plan after these numbers of streams, each read up to its offset; the last one is not read yet."""
        plan = EndlessStreamPlan(self.store.lengths, assignments[0][0], self.seed)
        for (_, until), (num_streams, _) in itertools.pairwise(assignments):
            plan = plan.reassign(num_streams, until)
        return plan


class DocumentStreams(EndlessStreams[TokenStore]):
    """Endless streams of texts; see :class:`EndlessStreams`."""

    def get_batch(self, step: int) -> Batch:
        """Return the batch of a step, ``(batch, length)``: a function of the arguments and the step only."""
        start, stop = self._extend_to(step)
        return read_batch(self.store, self._plan, self._streams, start, stop, stop)

    def token_indices(self, step: int) -> Tensor:
        """Return the index of each token of a step in the store's documents joined, ``(batch, length)`` int64."""
        start, stop = self._extend_to(step)
        indices = np.zeros((self.batch_size, self.length), dtype=np.int64)
        for row, stream in enumerate(self._streams):
            for document, position, first, end, _ in iter_spans(self.store, self._plan, stream, start, stop):
                span_indices = self.store.token_offsets[document] + np.arange(first, end)
                indices[row, position : position + end - first] = span_indices
        return torch.from_numpy(indices)


def _convert_position(saved: Mapping[str, Any], current: Mapping[str, Any], accumulate_grad_batches: int) -> int:
    """Return a saved position in the current batches; an unfinished epoch stays unfinished."""
    if saved["steps_per_epoch"] == current["steps_per_epoch"]:
        return int(saved["position"])
    epochs, steps = divmod(int(saved["position"]), int(saved["steps_per_epoch"]))
    tokens = steps * saved["global_batch_size"] * saved["length"]
    batches = -(-tokens // (current["global_batch_size"] * current["length"]))
    batches = -(-batches // accumulate_grad_batches) * accumulate_grad_batches
    steps_per_epoch = int(current["steps_per_epoch"])
    return epochs * steps_per_epoch + min(int(batches), steps_per_epoch - 1 if steps else 0)


def _describe_reassignment(plan: EndlessStreamPlan, num_streams: int, offset: int) -> str:
    """Return what a change to another number of streams at an offset means for the documents."""
    before = len(plan.end_offsets)
    plan.extend_to(offset)
    unfinished = sum(end > offset for end in plan.end_offsets[num_streams:])
    return (
        f"The checkpoint has {before} streams, this run {num_streams}: {min(before, num_streams)} continue with their "
        "document and memory"
        + (f", {num_streams - before} start with the next document" if num_streams > before else "")
        + (f", and the rest of {unfinished} documents is read next, with a fresh memory" if unfinished else "")
        + ". No token of the pass is left out or read twice."
    )


class PackedStreams(FixedBatches[B], Generic[S, B]):
    """Every document once, in streams of whole documents with a padded end; sums over the batches are exact.

    The summed negative log-likelihood over the summed words is PG-19's word perplexity exactly, for any number of
    streams and ranks. Every rank has the same number of batches. About ``limit_tokens`` tokens are read, in equal
    shares of every stream (None: all); the other arguments are those of :class:`DocumentStreams`. Raises DataError if a
    number is out of range.
    """

    def __init__(
        self,
        read: Callable[[S, StreamPlan, Sequence[int], int, int, int], B],
        store: S,
        batch_size: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        limit_tokens: int | None = None,
    ) -> None:
        streams = _rank_streams(batch_size, length, rank, world_size)
        if limit_tokens is not None and limit_tokens < 1:
            raise DataError(f"limit_tokens is {limit_tokens}, expected at least 1.", "Use null for all tokens.")
        self.store, self.batch_size, self.rank = store, batch_size, rank
        self._plan = plan = pack_documents(store.lengths, batch_size * world_size)
        end = max(plan.end_offsets)
        if limit_tokens is not None:
            end = min(end, math.ceil(limit_tokens / (batch_size * world_size)))
        num_batches = math.ceil(end / length)
        super().__init__(num_batches, lambda step: read(store, plan, streams, step * length, (step + 1) * length, end))


class EvaluationStreams(PackedStreams[TokenStore, Batch]):
    """Every text once; see :class:`PackedStreams`."""

    def __init__(self, store: TokenStore, *arguments: Any, **options: Any) -> None:
        super().__init__(read_batch, store, *arguments, **options)
