"""Where a book was surprising, in constant memory: along the book, and by distance from its beginning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 1024
BINS_PER_OCTAVE = 3
MIN_POSITION = 16
"""Positions below this are one stretch: single tokens would be noise."""

FloatArray = NDArray[np.float64]


class SurprisalCurve:
    """Mean surprise over at most ``num_bins`` equal stretches of a stream of any length.

    A stretch begins as one token; when all are full, neighbours are joined and the stretches are twice as long.
    So it is exact sums throughout, and its memory is fixed.

    Attributes:
        bin_width: tokens a stretch.
        num_tokens: tokens counted.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        if num_bins < 2 or num_bins % 2:
            raise ValueError(f"num_bins is {num_bins}, expected an even number of at least 2.")
        self.sums = np.zeros((2, num_bins))
        self.bin_width = 1
        self.num_tokens = 0

    def add(self, nll: NDArray[np.float32]) -> None:
        """Count the next tokens' surprise, (n,) in nats."""
        bins = self.sums.shape[1]
        values = nll.astype(np.float64)
        while len(values):
            if self.num_tokens == bins * self.bin_width:
                joined = self.sums.reshape(2, bins // 2, 2).sum(axis=2)
                self.sums = np.concatenate([joined, np.zeros_like(joined)], axis=1)
                self.bin_width *= 2
            now, values = np.split(values, [min(len(values), bins * self.bin_width - self.num_tokens)])
            place = (self.num_tokens + np.arange(len(now))) // self.bin_width
            for row, weights in enumerate((np.ones_like(now), now)):
                self.sums[row] += np.bincount(place, weights=weights, minlength=bins)
            self.num_tokens += len(now)

    def points(self) -> tuple[FloatArray, FloatArray]:
        """Return the middle of each stretch (in tokens) and its mean surprise (nats), (n,) each."""
        middle = (np.arange(self.sums.shape[1], dtype=np.float64) + 0.5) * self.bin_width
        full = self.sums[0] > 0
        return middle[full], self.sums[1][full] / self.sums[0][full]


class PositionSurprisalCurve:
    """Mean surprise by position in the text, in stretches of equal length on a logarithmic axis."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, 64 * BINS_PER_OCTAVE))
        self.num_tokens = 0

    def add(self, nll: NDArray[np.float32]) -> None:
        """Count the next tokens' surprise, (n,) in nats."""
        values = nll.astype(np.float64)
        position = np.maximum(self.num_tokens + 1.0 + np.arange(len(values)), MIN_POSITION)
        place = np.floor(np.log2(position) * BINS_PER_OCTAVE).astype(np.int64)
        for row, weights in enumerate((np.ones_like(values), values, values * values)):
            self.sums[row] += np.bincount(place, weights=weights, minlength=self.sums.shape[1])
        self.num_tokens += len(values)

    def points(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return each stretch's position (counted from 1), mean surprise and its standard error, (n,) each."""
        full = self.sums[0] > 0
        count, total, squares = self.sums[:, full]
        mean = total / count
        middle = 2 ** ((np.arange(len(full), dtype=np.float64) + 0.5) / BINS_PER_OCTAVE)
        middle[np.flatnonzero(full)[:1]] = MIN_POSITION / 2  # The first stretch is all before it as well.
        return middle[full], mean, np.sqrt(np.maximum(squares / count - mean**2, 0) / count)
