"""Assignment of documents to streams: pure functions of seed, document lengths and number of streams.

Every rank computes the same plan of all ranks' streams, so no document is read twice and no plan is communicated.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


class StreamPlan:
    """The documents of each stream, in order.

    An offset counts the tokens of a stream before a position.

    Attributes:
        start_offsets: Per stream, the ascending offsets at which its documents start.
        document_indices: Per stream, the index of each of its documents.
        first_tokens: Per stream, the first token that it reads of each document: 0 unless another stream began it.
        end_offsets: ``(streams,)`` list. Offset at which the last document of each stream ends so far.
    """

    def __init__(self, num_streams: int) -> None:
        self.start_offsets: list[list[int]] = [[] for _ in range(num_streams)]
        self.document_indices: list[list[int]] = [[] for _ in range(num_streams)]
        self.first_tokens: list[list[int]] = [[] for _ in range(num_streams)]
        self.end_offsets = [0] * num_streams

    def append(self, stream: int, document: int, length: int, first_token: int = 0) -> None:
        """Append a document to a stream, from token ``first_token`` on."""
        self.start_offsets[stream].append(self.end_offsets[stream])
        self.document_indices[stream].append(document)
        self.first_tokens[stream].append(first_token)
        self.end_offsets[stream] += length - first_token

    def iter_documents(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield the documents of a stream within offsets ``start`` to ``stop``: index, start offset, first token."""
        start_offsets = self.start_offsets[stream]
        for position in range(max(0, bisect.bisect_right(start_offsets, start) - 1), len(start_offsets)):
            if start_offsets[position] >= stop:
                return
            yield self.document_indices[stream][position], start_offsets[position], self.first_tokens[stream][position]


class EndlessStreamPlan(StreamPlan):
    """The plan of training: a free stream takes the next document of a shuffled pass, and passes follow one another.

    Every pass holds each document once, over all streams; its order is a function of seed and pass.

    Args:
        lengths: ``(documents,)`` tokens of each document.
        num_streams: Number of streams of all ranks together.
        seed: Seed of the shuffles.
    """

    def __init__(self, lengths: NDArray[np.int64], num_streams: int, seed: int) -> None:
        super().__init__(num_streams)
        self._lengths, self._seed = lengths, seed
        self._pass_index = 0
        self._remaining: list[tuple[int, int]] = []  # unassigned documents and their first tokens, the next one last
        self._stream_heap = [(0, stream) for stream in range(num_streams)]

    def extend_to(self, offset: int) -> None:
        """Extend the plan until every stream has documents up to an offset; earlier assignments stay."""
        while self._stream_heap[0][0] < offset:
            if not self._remaining:
                order = np.random.default_rng([self._seed, self._pass_index]).permutation(len(self._lengths))
                self._remaining = [(document, 0) for document in order[::-1].tolist()]
                self._pass_index += 1
            document, first_token = self._remaining.pop()
            _, stream = self._stream_heap[0]
            self.append(stream, document, int(self._lengths[document]), first_token)
            heapq.heapreplace(self._stream_heap, (self.end_offsets[stream], stream))

    def reassign(self, num_streams: int, offset: int) -> EndlessStreamPlan:
        """Return a plan that assigns what is left from an offset on to another number of streams.

        Every token is in one of the two plans. The first streams continue where they are. A new stream takes the next
        document. Documents that removed streams have not finished come next, before those that nobody began.

        Args:
            num_streams: Number of streams of all ranks together.
            offset: Offset up to which this plan was read; the new plan's offsets continue from it.
        """
        self.extend_to(offset)
        plan = EndlessStreamPlan(self._lengths, num_streams, self._seed)
        plan._pass_index, plan._remaining = self._pass_index, list(self._remaining)
        for stream in range(num_streams):
            plan.end_offsets[stream] = offset
            if stream < len(self.end_offsets) and self.end_offsets[stream] > offset:
                plan.start_offsets[stream] = self.start_offsets[stream][-1:]
                plan.document_indices[stream] = self.document_indices[stream][-1:]
                plan.first_tokens[stream] = self.first_tokens[stream][-1:]
                plan.end_offsets[stream] = self.end_offsets[stream]
        # In reverse, since the next document is last.
        for stream in reversed(range(num_streams, len(self.end_offsets))):
            if self.end_offsets[stream] > offset:
                first_token = offset - self.start_offsets[stream][-1] + self.first_tokens[stream][-1]
                plan._remaining.append((self.document_indices[stream][-1], first_token))
        plan._stream_heap = [(end, stream) for stream, end in enumerate(plan.end_offsets)]
        heapq.heapify(plan._stream_heap)
        return plan


def pack_documents(lengths: NDArray[np.int64], num_streams: int) -> StreamPlan:
    """Return a plan that reads each document once: longest first, each in the stream that ends earliest."""
    plan = StreamPlan(num_streams)
    heap = [(0, stream) for stream in range(num_streams)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        _, stream = heap[0]
        plan.append(stream, document, int(lengths[document]))
        heapq.heapreplace(heap, (plan.end_offsets[stream], stream))
    return plan
