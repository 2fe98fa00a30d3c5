"""Rows of whole documents: which row reads which document when, and the batches that follow from it.

A plan is a pure function of seed, lengths and number of rows, and a batch of plan and step. So a position in the data
is one integer, equal on all ranks, and resuming is setting it.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memtx.data.batch import IGNORED, Batch
from memtx.data.shards import TokenStore
from memtx.errors import CheckpointError, DataError


class RowPlan:
    """What each row reads, document after document.

    Attributes:
        begins: per row, the tick (tokens of the row before it) at which each of its documents begins, ascending.
        documents: per row, the index of each of its documents.
        ends: (rows,) list, the tick at which each row's last document ends so far.
    """

    def __init__(self, rows: int) -> None:
        self.begins: list[list[int]] = [[] for _ in range(rows)]
        self.documents: list[list[int]] = [[] for _ in range(rows)]
        self.ends = [0] * rows

    def append(self, row: int, document: int, length: int) -> None:
        """Let a row read a document after what it has."""
        self.begins[row].append(self.ends[row])
        self.documents[row].append(document)
        self.ends[row] += length

    def within(self, row: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield (document, tick of its begin) for those of a row that reach into ticks ``start`` to ``stop``."""
        begins = self.begins[row]
        for place in range(max(0, bisect.bisect_right(begins, start) - 1), len(begins)):
            if begins[place] >= stop:
                return
            yield self.documents[row][place], begins[place]


class EndlessPlan(RowPlan):
    """Training's plan: a row that is free takes the next document of a shuffled pass, and passes follow one another.

    Every pass holds each document once, over all rows; its order is a function of seed and pass.

    Args:
        lengths: (documents,) tokens of each.
        rows: rows of all ranks together.
        seed: of the shuffles.
    """

    def __init__(self, lengths: NDArray[np.int64], rows: int, seed: int) -> None:
        super().__init__(rows)
        self._lengths, self._seed = lengths, seed
        self._pass = 0
        self._left: list[int] = []
        self._free = [(0, row) for row in range(rows)]

    def reach(self, tick: int) -> None:
        """Extend the plan until every row has documents up to a tick; what was planned stays."""
        while self._free[0][0] < tick:
            if not self._left:
                order = np.random.default_rng([self._seed, self._pass]).permutation(len(self._lengths))
                self._left = order[::-1].tolist()
                self._pass += 1
            document = self._left.pop()
            _, row = self._free[0]
            self.append(row, document, int(self._lengths[document]))
            heapq.heapreplace(self._free, (self.ends[row], row))


def finite_plan(lengths: NDArray[np.int64], rows: int) -> RowPlan:
    """Return a plan that reads each document once: the longest first, each to the row that ends earliest."""
    plan = RowPlan(rows)
    free = [(0, row) for row in range(rows)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        _, row = free[0]
        plan.append(row, document, int(lengths[document]))
        heapq.heapreplace(free, (plan.ends[row], row))
    return plan


def read_rows(store: TokenStore, plan: RowPlan, rows: Sequence[int], start: int, stop: int, last: int) -> Batch:
    """Return ticks ``start`` to ``stop`` of some rows of a plan.

    Places past a row's end, or from tick ``last`` on, are padding: each is ``begin`` with a start of its own and no
    label, so it disturbs nothing before it and is counted nowhere.

    Args:
        store: the tokens.
        plan: must reach ``stop`` unless it is finite.
        rows: rows of the plan, in the batch's order.
        start: first tick.
        stop: tick after the last one.
        last: tick from which on nothing is read.
    """
    shape = (len(rows), stop - start)
    tokens, labels = np.full(shape, store.begin, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    starts = np.ones(shape, dtype=np.bool_)
    words, size = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    end = min(stop, last)
    for index, row in enumerate(rows):
        for document, begin in plan.within(row, start, end):
            length = int(store.lengths[document])
            first, past = max(start - begin, 0), min(end - begin, length)
            if first >= past:
                continue
            # One token more than is read: the label of the last one, where the document goes on.
            text = store.slice(document, first, past + 1)
            place, count, scored = begin + first - start, past - first, len(text) - 1
            if past == length:
                scored = count - 1
            tokens[index, place : place + count] = text[:count]
            labels[index, place : place + scored] = text[1 : 1 + scored]
            starts[index, place : place + count] = False
            starts[index, place] = first == 0
            words[index] += _share(int(store.words[document]), first, first + scored, length - 1)
            size[index] += _share(int(store.bytes[document]), first, first + scored, length - 1)
    return Batch(*map(torch.from_numpy, (tokens, labels, starts, words, size)))


def _share(amount: int, start: int, stop: int, count: int) -> int:
    """Return what of ``amount``, spread over ``count`` tokens, falls to ``start`` to ``stop``; sums are exact."""
    return amount * stop // count - amount * start // count if count else 0


def _check(rows: int, length: int, rank: int, world_size: int) -> None:
    for name, value in (("rows", rows), ("length", length), ("world_size", world_size)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1.")
    if not 0 <= rank < world_size:
        raise DataError(f"rank is {rank}, expected 0 to {world_size - 1}.")


class DocumentStreams:
    """Endless rows of whole documents for training, with a position that can be set.

    Iterating goes on from the position to the end of the epoch, the next multiple of ``len``. Rows read on across
    batches, epochs and passes; no token is dropped and none is padding.

    Args:
        store: the tokens.
        rows: rows of this rank's batches.
        length: tokens of a row in a batch.
        seed: of the shuffles.
        rank: this process, whose rows are ``rank * rows`` and on.
        world_size: processes; all together read each document once a pass.
        steps: batches of an epoch; None for the corpus once, total tokens // (all rows * length).

    Attributes:
        position: batches handed out so far, counted when they are handed out; equal on all ranks.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        store: TokenStore,
        rows: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
    ) -> None:
        _check(rows, length, rank, world_size)
        self.store, self.rows, self.length, self.seed = store, rows, length, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self._steps = steps if steps is not None else max(1, store.total // (rows * world_size * length))
        if self._steps < 1:
            raise DataError(f"steps is {steps}, expected at least 1.")
        self._plan = EndlessPlan(store.lengths, rows * world_size, seed)

    def __len__(self) -> int:
        """Batches of an epoch; constant, because Lightning asks once."""
        return self._steps

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, (rows, length): a function of arguments and step only.

        Args:
            step: 0 for the first batch of the first epoch, running on through epochs.
        """
        start, stop = step * self.length, (step + 1) * self.length
        self._plan.reach(stop)
        rows = range(self.rank * self.rows, (self.rank + 1) * self.rows)
        return read_rows(self.store, self._plan, rows, start, stop, stop)

    def documents(self, step: int) -> list[list[str]]:
        """Return the ids of the documents that each row of this rank reads in a step."""
        start, stop = step * self.length, (step + 1) * self.length
        self._plan.reach(stop)
        rows = range(self.rank * self.rows, (self.rank + 1) * self.rows)
        return [[self.store.ids[document] for document, _ in self._plan.within(row, start, stop)] for row in rows]

    def places(self, step: int) -> Tensor:
        """Return (rows, length) int64, which token of the store each of a step's is, documents one after another."""
        start, stop = step * self.length, (step + 1) * self.length
        self._plan.reach(stop)
        begins = np.cumsum(self.store.lengths) - self.store.lengths
        found = np.zeros((self.rows, self.length), dtype=np.int64)
        for row in range(self.rows):
            for document, begin in self._plan.within(self.rank * self.rows + row, start, stop):
                first = max(start - begin, 0)
                past = min(stop - begin, int(self.store.lengths[document]))
                found[row, begin + first - start : begin + past - start] = begins[document] + np.arange(first, past)
        return torch.from_numpy(found)

    def __iter__(self) -> Iterator[Batch]:
        stop = (self.position // self._steps + 1) * self._steps
        while self.position < stop:
            batch = self.batch(self.position)
            # Before the yield: a checkpoint of this batch's step must not read the batch again.
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it is a position in."""
        return {
            "position": self.position,
            "seed": self.seed,
            "rows": self.rows * self.world_size,
            "length": self.length,
            "corpus": self.store.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Another ``length`` is fine where the tokens read so far are a multiple of it.

        Raises:
            CheckpointError: the position is one in other data: another corpus or tokenizer, seed, or number of rows.
        """
        own = self.state_dict()
        cures = {
            "corpus": "Give the texts and the tokenizer the checkpoint was trained on, or start a new run from its "
            "weights.",
            "seed": "Resume with the checkpoint's seed.",
            "rows": "Resume with as many rows times devices, or start a new run from its weights.",
        }
        for key, cure in cures.items():
            if state_dict.get(key, own[key]) != own[key]:
                raise CheckpointError(
                    f"The checkpoint's data position belongs to {key} {_short(state_dict[key])}, "
                    f"this run has {_short(own[key])}.",
                    cure,
                )
        ticks = int(state_dict["position"]) * int(state_dict.get("length", self.length))
        if ticks % self.length:
            raise CheckpointError(
                f"The checkpoint has read {ticks} tokens a row, which is no multiple of this run's batch length "
                f"{self.length}.",
                "Resume with the checkpoint's segment and horizon.",
            )
        self.position = ticks // self.length


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


class EvaluationStreams:
    """Every document once, in rows of whole documents, the tail padded: sums over batches are exact figures.

    The summed negative log-likelihood over the summed words is PG-19's word perplexity exactly, whatever the rows and
    ranks. Every rank has equally many batches.

    Args:
        store: the tokens.
        rows: rows of this rank's batches.
        length: tokens of a row in a batch.
        rank: this process.
        world_size: processes.
        limit_tokens: read about this many tokens only, an equal share of every row; None for all.

    Raises:
        DataError: a number is out of its range.
    """

    def __init__(
        self,
        store: TokenStore,
        rows: int,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        limit_tokens: int | None = None,
    ) -> None:
        _check(rows, length, rank, world_size)
        if limit_tokens is not None and limit_tokens < 1:
            raise DataError(f"limit_tokens is {limit_tokens}, expected at least 1.", "Use null for all tokens.")
        self.store, self.rows, self.length = store, rows, length
        self.rank, self.world_size = rank, world_size
        self._plan = finite_plan(store.lengths, rows * world_size)
        self._last = max(self._plan.ends)
        if limit_tokens is not None:
            self._last = min(self._last, math.ceil(limit_tokens / (rows * world_size)))

    def __len__(self) -> int:
        """Batches, equal on all ranks."""
        return math.ceil(self._last / self.length)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, (rows, length)."""
        rows = range(self.rank * self.rows, (self.rank + 1) * self.rows)
        start = step * self.length
        return read_rows(self.store, self._plan, rows, start, start + self.length, self._last)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            yield self.batch(step)
