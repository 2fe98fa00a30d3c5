"""Rows of whole documents as batches: a batch is a pure function of a plan and the step.

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

from memtx.data.batch import IGNORED, Batch
from memtx.data.plans import EndlessPlan, RowPlan, finite_plan
from memtx.data.shards import TokenStore
from memtx.errors import CheckpointError, DataError


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
        for document, place, first, past, begun in _read(store, plan, row, start, end):
            # One token more than is read: the label of the last one, where the document goes on.
            text, length = store.slice(document, first, past + 1), int(store.lengths[document])
            count, scored = past - first, len(text) - 1
            if past == length:
                scored = count - 1
            tokens[index, place : place + count] = text[:count]
            labels[index, place : place + scored] = text[1 : 1 + scored]
            starts[index, place : place + count] = False
            starts[index, place] = begun
            words[index] += _share(int(store.words[document]), first, first + scored, length - 1)
            size[index] += _share(int(store.bytes[document]), first, first + scored, length - 1)
    return Batch(*map(torch.from_numpy, (tokens, labels, starts, words, size)))


def _read(
    store: TokenStore, plan: RowPlan, row: int, start: int, stop: int
) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield what a row reads from one tick to another: document, place, first token, the one past it, begun there."""
    for document, tick, taken in plan.within(row, start, stop):
        # Where the document's token 0 would stand, were it the row's from there on.
        begin = tick - taken
        first, past = max(start - begin, taken), min(stop - begin, int(store.lengths[document]))
        if first < past:
            yield document, begin + first - start, first, past, first == taken


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
    batches, epochs and passes; no token is dropped and none is padding. Resumed with another number of rows, on however
    many ranks, it deals what is left to these: every token is still read once a pass (:meth:`EndlessPlan.dealt`).

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
        redealt: what a resume with other rows means, as a sentence; empty where they are the same.

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
        self.redealt = ""
        self._deals: list[tuple[int, int]] = []  # earlier numbers of rows, each with the tick it was read up to
        self._step, self._tick = 0, 0  # a batch, and the tick at which it begins

    def __len__(self) -> int:
        """Batches of an epoch; constant, because Lightning asks once."""
        return self._steps

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, (rows, length): a function of arguments and step only.

        Args:
            step: 0 for the first batch of the first epoch, running on through epochs.
        """
        start, stop = self._ticks(step), self._ticks(step + 1)
        self._plan.reach(stop)
        return read_rows(self.store, self._plan, self._own(), start, stop, stop)

    def _ticks(self, step: int) -> int:
        return self._tick + (step - self._step) * self.length

    def _own(self) -> range:
        return range(self.rank * self.rows, (self.rank + 1) * self.rows)

    def documents(self, step: int) -> list[list[str]]:
        """Return the ids of the documents that each row of this rank reads in a step."""
        start, stop = self._ticks(step), self._ticks(step + 1)
        self._plan.reach(stop)
        within = (self._plan.within(row, start, stop) for row in self._own())
        return [[self.store.ids[document] for document, _, _ in row] for row in within]

    def places(self, step: int) -> Tensor:
        """Return (rows, length) int64, which token of the store each of a step's is, documents one after another."""
        start, stop = self._ticks(step), self._ticks(step + 1)
        self._plan.reach(stop)
        found = np.zeros((self.rows, self.length), dtype=np.int64)
        for index, row in enumerate(self._own()):
            for document, place, first, past, _ in _read(self.store, self._plan, row, start, stop):
                found[index, place : place + past - first] = self.store.begins[document] + np.arange(first, past)
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
            "steps": self._steps,
            "ticks": self._ticks(self.position),
            "seed": self.seed,
            "rows": self.rows * self.world_size,
            "length": self.length,
            "deals": [list(one) for one in self._deals],
            "corpus": self.store.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any], stride: int = 1) -> None:
        """Go to a saved position.

        With other rows or another length the epoch's rest has another number of batches, and the position counts them.

        Args:
            state_dict: as :meth:`state_dict` returned it.
            stride: batches of an optimiser step; a position that counts other batches than it did is a multiple.

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
                    f"The checkpoint's data position belongs to {key} {_short(state_dict[key])}, "
                    f"this run has {_short(own[key])}.",
                    cure,
                )
        saved = {**own, **state_dict}
        rows, ticks = saved["rows"], state_dict.get("ticks", saved["position"] * saved["length"])
        self._deals = [(before, until) for before, until in saved["deals"]]
        plan = self._planned([*self._deals, (rows, ticks)])
        if rows == own["rows"]:
            self._plan, self.redealt = plan, ""
        else:
            self._deals.append((rows, ticks))
            self._plan, self.redealt = plan.dealt(own["rows"], ticks), _said(plan, own["rows"], ticks)
        self.position = _counted(saved, own, stride)
        self._step, self._tick = self.position, ticks

    def _planned(self, deals: Sequence[tuple[int, int]]) -> EndlessPlan:
        """Return the plan that numbers of rows, each up to a tick, leave; of the last number, not read yet."""
        plan = EndlessPlan(self.store.lengths, deals[0][0], self.seed)
        for (_, until), (rows, _) in itertools.pairwise(deals):
            plan = plan.dealt(rows, until)
        return plan


def _counted(saved: Mapping[str, Any], own: Mapping[str, Any], stride: int) -> int:
    """Return a saved position in batches of our own; an epoch that was not over stays so."""
    if saved["steps"] == own["steps"]:
        return int(saved["position"])
    epochs, done = divmod(int(saved["position"]), int(saved["steps"]))
    batches = -(-done * saved["rows"] * saved["length"] // (own["rows"] * own["length"]))
    return int(epochs * own["steps"] + min(-(-batches // stride) * stride, own["steps"] - 1 if done else 0))


def _said(plan: EndlessPlan, rows: int, tick: int) -> str:
    """Return what dealing a plan that was read up to a tick to other rows means for its documents."""
    before = len(plan.ends)
    plan.reach(tick)
    begun = sum(end > tick for end in plan.ends[rows:])
    return (
        f"The checkpoint has {before} rows, this run {rows}: {min(before, rows)} go on with their document and memory"
        + (f", {rows - before} begin with a document that is next" if rows > before else "")
        + (f", and what is left of {begun} documents is read next, with a fresh memory" if begun else "")
        + ". No token of the pass is left out or read twice."
    )


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
