"""Recall across segments: pairs of a key and a value, long noise, then "? key" (T1, associative recall).

A task that a window alone cannot solve beyond its reach, so it tells whether a memory remembers and for how long.
The first segment holds the pairs at random places among noise; later ones hold noise, and questions where they are
asked. The answer is never in the stream, so it can only come from the first segment. With more pairs it tells how much
a memory holds (T2; multi-query associative recall, Arora et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from memtx.data.batch import IGNORE_INDEX
from memtx.data.synthetic_tasks.base import KeyValueTask, LabelledSegment, QueryMode


@dataclass(frozen=True)
class AssociativeRecall(KeyValueTask):
    """The pairs of the first segment are asked for."""

    def _iter_segments(
        self, batch_size: int, num_segments: int, generator: torch.Generator, query_mode: QueryMode
    ) -> Iterator[LabelledSegment]:
        keys, values = self._sample_keys(batch_size, generator), self._sample_values(batch_size, generator)
        yield self._scatter_pairs(keys, values, generator), torch.full((batch_size, self.segment_length), IGNORE_INDEX)
        for number in range(1, num_segments):
            asks = query_mode == "later" or number == num_segments - 1
            yield self._query_segment(keys, values, generator) if asks else self._noise_segment(batch_size, generator)
