"""Which stream reads which document when: pure functions of seed, lengths and number of streams.

Every rank computes the same plan of all ranks' streams, so no document is read twice and none of it is communicated.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class StreamPlan:
    """What each stream reads, document after document.

    Attributes:
        start_offsets: per stream, the offset (tokens of the stream before it) at which it takes each of its documents,
            ascending.
        document_indices: per stream, the index of each of its documents.
        first_tokens: per stream, the token from which on it reads each of them: 0 but where another stream began it.
        end_offsets: (streams,) list, the offset at which each stream's last document ends so far.
    """

    def __init__(self, num_streams: int) -> None:
        self.start_offsets: list[list[int]] = [[] for _ in range(num_streams)]
        self.document_indices: list[list[int]] = [[] for _ in range(num_streams)]
        self.first_tokens: list[list[int]] = [[] for _ in range(num_streams)]
        self.end_offsets = [0] * num_streams

    def append(self, stream: int, document: int, length: int, first_token: int = 0) -> None:
        """Let a stream read a document after what it has, from token ``first_token`` on."""
        self.start_offsets[stream].append(self.end_offsets[stream])
        self.document_indices[stream].append(document)
        self.first_tokens[stream].append(first_token)
        self.end_offsets[stream] += length - first_token

    def iter_documents(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of a stream that reach into offsets ``start`` to ``stop``.

        Each with the offset at which the stream takes it, and the token from which on the stream reads it.
        """
        begins = self.start_offsets[stream]
        for place in range(max(0, bisect.bisect_right(begins, start) - 1), len(begins)):
            if begins[place] >= stop:
                return
            yield self.document_indices[stream][place], begins[place], self.first_tokens[stream][place]


class EndlessStreamPlan(StreamPlan):
    """Training's plan: a stream that is free takes the next document of a shuffled pass, and passes follow one another.

    Every pass holds each document once, over all streams; its order is a function of seed and pass.

    Args:
        lengths: (documents,) tokens of each.
        num_streams: streams of all ranks together.
        seed: of the shuffles.
    """

    def __init__(self, lengths: NDArray[np.int64], num_streams: int, seed: int) -> None:
        super().__init__(num_streams)
        self._lengths, self._seed = lengths, seed
        self._pass_index = 0
        self._remaining: list[tuple[int, int]] = []  # document and first token not dealt, the next one last
        self._stream_heap = [(0, row) for row in range(num_streams)]

    def extend_to(self, offset: int) -> None:
        """Extend the plan until every stream has documents up to an offset; what was planned stays."""
        while self._stream_heap[0][0] < offset:
            if not self._remaining:
                order = np.random.default_rng([self._seed, self._pass_index]).permutation(len(self._lengths))
                self._remaining = [(document, 0) for document in order[::-1].tolist()]
                self._pass_index += 1
            document, first = self._remaining.pop()
            _, row = self._stream_heap[0]
            self.append(row, document, int(self._lengths[document]), first)
            heapq.heapreplace(self._stream_heap, (self.end_offsets[row], row))

    def reassign(self, num_streams: int, offset: int) -> EndlessStreamPlan:
        """Return what is left from an offset on, dealt to other streams; every token stands in one of both plans.

        The first streams go on where they are. A stream that is new takes the next document; what a stream that is no
        more had left of its document comes next, before documents that nobody began.

        Args:
            num_streams: of all ranks together.
            offset: this plan must not reach further yet; the new plan's offsets run on from it.
        """
        self.extend_to(offset)
        made = EndlessStreamPlan(self._lengths, num_streams, self._seed)
        made._pass_index, made._remaining = self._pass_index, list(self._remaining)
        for row in range(num_streams):
            made.end_offsets[row] = offset
            if row < len(self.end_offsets) and self.end_offsets[row] > offset:
                made.start_offsets[row], made.document_indices[row] = (
                    self.start_offsets[row][-1:],
                    self.document_indices[row][-1:],
                )
                made.first_tokens[row], made.end_offsets[row] = self.first_tokens[row][-1:], self.end_offsets[row]
        # From the last on, since the next to be dealt stands last.
        for row in reversed(range(num_streams, len(self.end_offsets))):
            if self.end_offsets[row] > offset:
                made._remaining.append(
                    (self.document_indices[row][-1], offset - self.start_offsets[row][-1] + self.first_tokens[row][-1])
                )
        made._stream_heap = [(end, row) for row, end in enumerate(made.end_offsets)]
        heapq.heapify(made._stream_heap)
        return made


def pack_documents(lengths: NDArray[np.int64], num_streams: int) -> StreamPlan:
    """Return a plan that reads each document once: the longest first, each to the stream that ends earliest."""
    plan = StreamPlan(num_streams)
    free = [(0, row) for row in range(num_streams)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        _, row = free[0]
        plan.append(row, document, int(lengths[document]))
        heapq.heapreplace(free, (plan.end_offsets[row], row))
    return plan
