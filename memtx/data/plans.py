"""Which row reads which document when: pure functions of seed, lengths and number of rows.

Every rank computes the same plan of all ranks' rows, so no document is read twice and none of it is communicated.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class RowPlan:
    """What each row reads, document after document.

    Attributes:
        begins: per row, the tick (tokens of the row before it) at which it takes each of its documents, ascending.
        documents: per row, the index of each of its documents.
        firsts: per row, the token from which on it reads each of them: 0 but where another row began it.
        ends: (rows,) list, the tick at which each row's last document ends so far.
    """

    def __init__(self, rows: int) -> None:
        self.begins: list[list[int]] = [[] for _ in range(rows)]
        self.documents: list[list[int]] = [[] for _ in range(rows)]
        self.firsts: list[list[int]] = [[] for _ in range(rows)]
        self.ends = [0] * rows

    def append(self, row: int, document: int, length: int, first: int = 0) -> None:
        """Let a row read a document after what it has, from token ``first`` on."""
        self.begins[row].append(self.ends[row])
        self.documents[row].append(document)
        self.firsts[row].append(first)
        self.ends[row] += length - first

    def within(self, row: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of a row that reach into ticks ``start`` to ``stop``.

        Each with the tick at which the row takes it, and the token from which on the row reads it.
        """
        begins = self.begins[row]
        for place in range(max(0, bisect.bisect_right(begins, start) - 1), len(begins)):
            if begins[place] >= stop:
                return
            yield self.documents[row][place], begins[place], self.firsts[row][place]


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
        self._left: list[tuple[int, int]] = []  # document and first token not dealt, the next one last
        self._free = [(0, row) for row in range(rows)]

    def reach(self, tick: int) -> None:
        """Extend the plan until every row has documents up to a tick; what was planned stays."""
        while self._free[0][0] < tick:
            if not self._left:
                order = np.random.default_rng([self._seed, self._pass]).permutation(len(self._lengths))
                self._left = [(document, 0) for document in order[::-1].tolist()]
                self._pass += 1
            document, first = self._left.pop()
            _, row = self._free[0]
            self.append(row, document, int(self._lengths[document]), first)
            heapq.heapreplace(self._free, (self.ends[row], row))

    def dealt(self, rows: int, tick: int) -> EndlessPlan:
        """Return what is left from a tick on, dealt to another number of rows; every token stands in one of both plans.

        The first rows go on where they are. A row that is new takes the next document; what a row that is no more had
        left of its document comes next, before documents that nobody began.

        Args:
            rows: of all ranks together.
            tick: this plan must not reach further yet; the new plan's ticks run on from it.
        """
        self.reach(tick)
        made = EndlessPlan(self._lengths, rows, self._seed)
        made._pass, made._left = self._pass, list(self._left)
        for row in range(rows):
            made.ends[row] = tick
            if row < len(self.ends) and self.ends[row] > tick:
                made.begins[row], made.documents[row] = self.begins[row][-1:], self.documents[row][-1:]
                made.firsts[row], made.ends[row] = self.firsts[row][-1:], self.ends[row]
        # From the last on, since the next to be dealt stands last.
        for row in reversed(range(rows, len(self.ends))):
            if self.ends[row] > tick:
                made._left.append((self.documents[row][-1], tick - self.begins[row][-1] + self.firsts[row][-1]))
        made._free = [(end, row) for row, end in enumerate(made.ends)]
        heapq.heapify(made._free)
        return made


def finite_plan(lengths: NDArray[np.int64], rows: int) -> RowPlan:
    """Return a plan that reads each document once: the longest first, each to the row that ends earliest."""
    plan = RowPlan(rows)
    free = [(0, row) for row in range(rows)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        _, row = free[0]
        plan.append(row, document, int(lengths[document]))
        heapq.heapreplace(free, (plan.ends[row], row))
    return plan
