"""Series of one split: pieces of memory-mapped files, their statistics, and batches of them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memtx.data.batch import SequenceBatch
from memtx.data.series.files import CHUNK_VALUES, FILL_HINT
from memtx.data.series.schema import Array, SeriesSchema
from memtx.data.streams import EndlessStreams, PackedStreams, StreamPlan, iter_spans
from memtx.errors import DataError


@dataclass(frozen=True)
class Series:
    """Steps ``start`` to ``stop`` of a file.

    Attributes:
        path: File.
        values: ``(steps, columns)``, all of the file's steps.
        start: First step.
        stop: Step after the last.
    """

    path: Path
    values: NDArray[Any]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return steps ``start`` to ``stop``, counted from the beginning of the series."""
        return self.values[self.start + start : min(self.start + stop, self.stop)]

    def cut(self, max_length: int) -> list[Series]:
        """Return pieces of nearly equal length, none longer than ``max_length``."""
        bounds = np.linspace(self.start, self.stop, -(-len(self) // max_length) + 1).round().astype(int).tolist()
        return [replace(self, start=start, stop=stop) for start, stop in itertools.pairwise(bounds)]


class SeriesStore:
    """The series of one split, standardized when they are read.

    Args:
        series: Series with the columns ``schema.names``.
        fingerprint: SHA-256 of the values.
        schema: Columns and statistics.

    Attributes:
        lengths: ``(series,)`` int64, steps of each.
        num_tokens: Number of all steps.
    """

    def __init__(self, series: Sequence[Series], fingerprint: str, schema: SeriesSchema) -> None:
        self.series, self.schema, self.fingerprint = list(series), schema, fingerprint
        self.lengths = np.array([len(part) for part in self.series], dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())

    def read(self, index: int, start: int, stop: int) -> Array:
        """Return standardized steps of a series, ``(steps, columns)``."""
        return self.schema.scale(self.schema.names, self.series[index].read(start, stop))


def compute_statistics(series: Sequence[Series], names: tuple[str, ...]) -> tuple[Array, Array, str]:
    """Return mean and standard deviation of each column, ``(columns,)``, and the SHA-256 of all values.

    Raises DataError for a value that is not finite. Chunks are joined by the rule of Chan, Golub and LeVeque 1979.
    """
    digest = hashlib.sha256()
    count, mean, squares = 0, np.zeros(len(names)), np.zeros(len(names))
    step = max(1, CHUNK_VALUES // len(names))
    for part in series:
        digest.update(f"{len(part)}|".encode())
        for start in range(0, len(part), step):
            chunk = np.ascontiguousarray(part.read(start, start + step), dtype=np.float64)
            if not (is_finite := np.isfinite(chunk)).all():
                row, column = map(int, np.argwhere(~is_finite)[0])
                location = f"'{part.path}', step {part.start + start + row}, column '{names[column]}'"
                raise DataError(f"{location}: the value is {chunk[row, column]}.", FILL_HINT)
            digest.update(chunk.tobytes())
            total, difference = count + len(chunk), chunk.mean(0) - mean
            squares += ((chunk - chunk.mean(0)) ** 2).sum(0) + difference**2 * (count * len(chunk) / total)
            mean, count = mean + difference * (len(chunk) / total), total
    std = np.sqrt(squares / max(1, count))
    # Rounding leaves a remainder in a constant column, which must not be blown up.
    is_constant = std <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    return mean, np.where(is_constant, 1.0, std), digest.hexdigest()


def read_batch(
    store: SeriesStore, plan: StreamPlan, streams: Sequence[int], start: int, stop: int, end_offset: int
) -> SequenceBatch:
    """Return offsets ``start`` to ``stop`` of some streams of a plan, in this order.

    Positions past the end of a stream, or from ``end_offset`` on, are zero, each with a start of its own and no label.
    """
    schema, shape = store.schema, (len(streams), stop - start)
    inputs = np.zeros((*shape, len(schema.columns)), dtype=np.float32)
    labels = np.full((*shape, len(schema.targets)), np.nan, dtype=np.float32)
    document_starts = np.ones(shape, dtype=np.bool_)
    columns, targets = ([schema.names.index(name) for name in names] for names in (schema.columns, schema.targets))
    for stream_index, stream in enumerate(streams):
        for span in iter_spans(store, plan, stream, start, min(stop, end_offset)):
            count = span.end - span.first
            values = store.read(span.document, span.first, span.end + schema.steps_ahead)
            future = values[schema.steps_ahead :][:count]
            part = slice(span.position, span.position + count)
            inputs[stream_index, part] = values[:count, columns]
            labels[stream_index, span.position : span.position + len(future)] = future[:, targets]
            document_starts[stream_index, part] = False
            document_starts[stream_index, span.position] = span.is_start
    return SequenceBatch(*map(torch.from_numpy, (inputs, labels, document_starts)))


class SeriesStreams(EndlessStreams[SeriesStore]):
    """Endless streams of series for training; see :class:`memtx.data.streams.EndlessStreams`."""

    def get_batch(self, step: int) -> SequenceBatch:
        """Return the batch of a step: a function of the arguments and the step only."""
        start, stop = self._extend_to(step)
        return read_batch(self.store, self._plan, self._streams, start, stop, stop)


class SeriesEvaluationStreams(PackedStreams[SeriesStore, SequenceBatch]):
    """Every series once; see :class:`memtx.data.streams.PackedStreams`."""

    def __init__(self, store: SeriesStore, *arguments: Any, **options: Any) -> None:
        super().__init__(read_batch, store, *arguments, **options)
