"""Streams of whole documents as batches: a batch is a pure function of a plan and the step.

So a position in the data is a few integers, equal on all ranks, and resuming is setting them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.data.packing import EndlessStreamPlan, StreamPlan, pack_documents
from memtx.data.shards import TokenStore
from memtx.errors import CheckpointError, DataError


def read_batch(
    store: TokenStore, plan: StreamPlan, streams: Sequence[int], start: int, stop: int, end_offset: int
) -> Batch:
    """Return offsets ``start`` to ``stop`` of some streams of a plan.

    Places past a stream's end, or from offset ``end_offset`` on, are padding: each is ``bos_token_id`` with a start of
    its own and no label, so it disturbs nothing before it and is counted nowhere.

    Args:
        store: the tokens.
        plan: must reach ``stop`` unless it is finite.
        streams: numbers of the plan's streams, in the batch's order.
        start: first offset.
        stop: offset after the last one.
        end_offset: offset from which on nothing is read.
    """
    shape = (len(streams), stop - start)
    tokens, labels = np.full(shape, store.bos_token_id, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
    starts = np.ones(shape, dtype=np.bool_)
    words, size = np.zeros(len(streams), dtype=np.int64), np.zeros(len(streams), dtype=np.int64)
    end = min(stop, end_offset)
    for index, row in enumerate(streams):
        for document, place, first, past, begun in _iter_token_ranges(store, plan, row, start, end):
            # One token more than is read: the label of the last one, where the document goes on.
            text, length = store.slice_tokens(document, first, past + 1), int(store.lengths[document])
            count, scored = past - first, len(text) - 1
            if past == length:
                scored = count - 1
            tokens[index, place : place + count] = text[:count]
            labels[index, place : place + scored] = text[1 : 1 + scored]
            starts[index, place : place + count] = False
            starts[index, place] = begun
            words[index] += _prorate(int(store.num_words[document]), first, first + scored, length - 1)
            size[index] += _prorate(int(store.num_bytes[document]), first, first + scored, length - 1)
    return Batch(*map(torch.from_numpy, (tokens, labels, starts, words, size)))


def _iter_token_ranges(
    store: TokenStore, plan: StreamPlan, stream: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield what a stream reads between two offsets: document, place, first token, the one past it, begun there."""
    for document, tick, taken in plan.iter_documents(stream, start, stop):
        # Where the document's token 0 would stand, were it the stream's from there on.
        begin = tick - taken
        first, past = max(start - begin, taken), min(stop - begin, int(store.lengths[document]))
        if first < past:
            yield document, begin + first - start, first, past, first == taken


def _prorate(amount: int, start: int, stop: int, count: int) -> int:
    """Return what of ``amount``, spread over ``count`` tokens, falls to ``start`` to ``stop``; sums are exact."""
    return amount * stop // count - amount * start // count if count else 0


def _check_arguments(batch_size: int, length: int, rank: int, world_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("length", length), ("world_size", world_size)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, expected 0 to {world_size - 1}.")


class DocumentStreams:
    """Endless streams of whole documents for training, with a position that can be set.

    Iterating goes on from the position to the end of the epoch, the next multiple of ``len``. Streams read on across
    batches, epochs and passes; no token is dropped and none is padding. Resumed with another number of streams, on
    however many ranks, it deals what is left to these: every token is still read once a pass
    (:meth:`memtx.data.packing.EndlessStreamPlan.reassign`).

    Args:
        store: the tokens.
        batch_size: streams of this rank's batches.
        length: tokens of a stream in a batch.
        seed: of the shuffles.
        rank: this process, whose streams are ``rank * batch_size`` and on.
        world_size: processes; all together read each document once a pass.
        steps_per_epoch: batches of an epoch; None for the corpus once, total tokens // (all streams * length).

    Attributes:
        position: batches handed out so far, counted when they are handed out; equal on all ranks.
        resume_message: what a resume with other streams means, as a sentence; empty where they are the same.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps_per_epoch: int | None = None,
    ) -> None:
        _check_arguments(batch_size, length, rank, world_size)
        self.store, self.batch_size, self.length, self.seed = store, batch_size, length, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._steps_per_epoch = (
            steps_per_epoch
            if steps_per_epoch is not None
            else max(1, store.num_tokens // (batch_size * world_size * length))
        )
        if self._steps_per_epoch < 1:
            raise DataError(f"steps_per_epoch is {steps_per_epoch}, expected at least 1.")
        self._plan = EndlessStreamPlan(store.lengths, batch_size * world_size, seed)
        self.resume_message = ""
        self._assignments: list[
            tuple[int, int]
        ] = []  # earlier numbers of streams, each with the offset it was read up to
        self._resume_step, self._resume_offset = 0, 0  # a batch, and the offset at which it begins

    def __len__(self) -> int:
        """Batches of an epoch; constant, because Lightning asks once."""
        return self._steps_per_epoch

    def get_batch(self, step: int) -> Batch:
        """Return the batch of a step, (batch, length): a function of arguments and step only.

        Args:
            step: 0 for the first batch of the first epoch, running on through epochs.
        """
        start, stop = self._offset_at(step), self._offset_at(step + 1)
        self._plan.extend_to(stop)
        return read_batch(self.store, self._plan, self._rank_streams(), start, stop, stop)

    def _offset_at(self, step: int) -> int:
        return self._resume_offset + (step - self._resume_step) * self.length

    def _rank_streams(self) -> range:
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def document_ids(self, step: int) -> list[list[str]]:
        """Return the ids of the documents that each stream of this rank reads in a step."""
        start, stop = self._offset_at(step), self._offset_at(step + 1)
        self._plan.extend_to(stop)
        within = (self._plan.iter_documents(row, start, stop) for row in self._rank_streams())
        return [[self.store.ids[document] for document, _, _ in row] for row in within]

    def token_indices(self, step: int) -> Tensor:
        """Return (batch, length) int64, which token of the store each of a step's is, documents one after another."""
        start, stop = self._offset_at(step), self._offset_at(step + 1)
        self._plan.extend_to(stop)
        found = np.zeros((self.batch_size, self.length), dtype=np.int64)
        for index, row in enumerate(self._rank_streams()):
            for document, place, first, past, _ in _iter_token_ranges(self.store, self._plan, row, start, stop):
                found[index, place : place + past - first] = self.store.token_offsets[document] + np.arange(first, past)
        return torch.from_numpy(found)

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.position // self._steps_per_epoch + 1) * self._steps_per_epoch
        while self.position < stop:
            batch = self.get_batch(self.position)
            # Before the yield: a checkpoint of this batch's step must not read the batch again.
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in."""
        return {
            "position": self.position,
            "steps_per_epoch": self._steps_per_epoch,
            "offset": self._offset_at(self.position),
            "seed": self.seed,
            "global_batch_size": self.batch_size * self.world_size,
            "length": self.length,
            "assignments": [list(one) for one in self._assignments],
            "corpus": self.store.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any], accumulate_grad_batches: int = 1) -> None:
        """Go to a saved position.

        With other streams or another length the epoch's rest has another number of batches, and the position counts
        them.

        Args:
            state_dict: as :meth:`state_dict` returned it.
            accumulate_grad_batches: batches of an optimiser step; a position that counts other batches than it did is a
                multiple.

        Raises:
            CheckpointError: the position is one in other data: another corpus or tokenizer, or another seed.
        """
        own = self.state_dict()
        cures = {
            "corpus": "Give the texts and the tokenizer the checkpoint was trained on, or start a new run from its "
            "weights.",
            "seed": "Resume with the checkpoint's seed.",
        }
        for key, cure in cures.items():
            if state_dict.get(key, own[key]) != own[key]:
                raise CheckpointError(
                    f"The checkpoint's data position belongs to {key} {_abbreviate(state_dict[key])}, "
                    f"this run has {_abbreviate(own[key])}.",
                    cure,
                )
        saved = {**own, **state_dict}
        rows, ticks = saved["global_batch_size"], state_dict.get("offset", saved["position"] * saved["length"])
        self._assignments = [(before, until) for before, until in saved["assignments"]]
        plan = self._build_plan([*self._assignments, (rows, ticks)])
        if rows == own["global_batch_size"]:
            self._plan, self.resume_message = plan, ""
        else:
            self._assignments.append((rows, ticks))
            self._plan, self.resume_message = (
                plan.reassign(own["global_batch_size"], ticks),
                _describe_reassignment(plan, own["global_batch_size"], ticks),
            )
        self.position = _convert_position(saved, own, accumulate_grad_batches)
        self._resume_step, self._resume_offset = self.position, ticks

    def _build_plan(self, assignments: Sequence[tuple[int, int]]) -> EndlessStreamPlan:
        """Return the plan that numbers of streams, each up to an offset, leave; of the last number, not read yet."""
        plan = EndlessStreamPlan(self.store.lengths, assignments[0][0], self.seed)
        for (_, until), (rows, _) in itertools.pairwise(assignments):
            plan = plan.reassign(rows, until)
        return plan


def _convert_position(saved: Mapping[str, Any], current: Mapping[str, Any], accumulate_grad_batches: int) -> int:
    """Return a saved position in batches of our own; an epoch that was not over stays so."""
    if saved["steps_per_epoch"] == current["steps_per_epoch"]:
        return int(saved["position"])
    epochs, done = divmod(int(saved["position"]), int(saved["steps_per_epoch"]))
    batches = -(
        -done * saved["global_batch_size"] * saved["length"] // (current["global_batch_size"] * current["length"])
    )
    return int(
        epochs * current["steps_per_epoch"]
        + min(
            -(-batches // accumulate_grad_batches) * accumulate_grad_batches,
            current["steps_per_epoch"] - 1 if done else 0,
        )
    )


def _describe_reassignment(plan: EndlessStreamPlan, num_streams: int, offset: int) -> str:
    """Return what dealing a plan that was read up to an offset to other streams means for its documents."""
    before = len(plan.end_offsets)
    plan.extend_to(offset)
    begun = sum(end > offset for end in plan.end_offsets[num_streams:])
    return (
        f"The checkpoint has {before} rows, this run {num_streams}: {min(before, num_streams)} go on with their "
        "document and memory"
        + (f", {num_streams - before} begin with a document that is next" if num_streams > before else "")
        + (f", and what is left of {begun} documents is read next, with a fresh memory" if begun else "")
        + ". No token of the pass is left out or read twice."
    )


def _abbreviate(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class EvaluationStreams:
    """Every document once, in streams of whole documents, the tail padded: sums over batches are exact figures.

    The summed negative log-likelihood over the summed words is PG-19's word perplexity exactly, whatever the streams
    and ranks. Every rank has equally many batches.

    Args:
        store: the tokens.
        batch_size: streams of this rank's batches.
        length: tokens of a stream in a batch.
        rank: this process.
        world_size: processes.
        limit_tokens: read about this many tokens only, an equal share of every stream; None for all.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        limit_tokens: int | None = None,
    ) -> None:
        _check_arguments(batch_size, length, rank, world_size)
        if limit_tokens is not None and limit_tokens < 1:
            raise DataError(f"limit_tokens is {limit_tokens}, expected at least 1.", "Use null for all tokens.")
        self.store, self.batch_size, self.length = store, batch_size, length
        self.rank, self.world_size = rank, world_size
        self._plan = pack_documents(store.lengths, batch_size * world_size)
        self._end_offset = max(self._plan.end_offsets)
        if limit_tokens is not None:
            self._end_offset = min(self._end_offset, math.ceil(limit_tokens / (batch_size * world_size)))

    def __len__(self) -> int:
        """Batches, equal on all ranks."""
        return math.ceil(self._end_offset / self.length)

    def get_batch(self, step: int) -> Batch:
        """Return the batch of a step, (batch, length)."""
        rows = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        start = step * self.length
        return read_batch(self.store, self._plan, rows, start, start + self.length, self._end_offset)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            yield self.get_batch(step)
