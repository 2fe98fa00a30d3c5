"""Mean surprisal of a book in constant memory: along the book, and by position on a logarithmic axis."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 3
MIN_POSITION = 16
"""Positions below this share one bin, since means of single tokens would be noise."""

FloatArray = NDArray[np.float64]


class SurprisalCurve:
    """Mean surprisal in at most ``num_bins`` (an even number) equal bins of a stream of any length.

    Bins start one token wide (``bin_width``); when all are full, pairs are merged, so sums are exact and memory is
    constant.
    """

    def __init__(self, num_bins: int = 1024) -> None:
        if num_bins < 2 or num_bins % 2:
            raise ValueError(f"num_bins is {num_bins}, expected an even number of at least 2.")
        self.sums = np.zeros((2, num_bins))
        self.bin_width, self.num_tokens = 1, 0

    def add(self, nll: NDArray[np.float32]) -> None:
        """Add the surprisal of the next tokens, ``(length,)`` in nats."""
        num_bins = self.sums.shape[1]
        values = nll.astype(np.float64)
        while len(values):
            if self.num_tokens == num_bins * self.bin_width:
                merged = self.sums.reshape(2, num_bins // 2, 2).sum(axis=2)
                self.sums = np.concatenate([merged, np.zeros_like(merged)], axis=1)
                self.bin_width *= 2
            fitting, values = np.split(values, [min(len(values), num_bins * self.bin_width - self.num_tokens)])
            _add_powers(self.sums, (self.num_tokens + np.arange(len(fitting))) // self.bin_width, fitting)
            self.num_tokens += len(fitting)

    def points(self) -> tuple[FloatArray, FloatArray]:
        """Return the center of each bin (in tokens) and its mean surprisal (in nats), ``(bins,)`` each."""
        centers = (np.arange(self.sums.shape[1], dtype=np.float64) + 0.5) * self.bin_width
        filled = self.sums[0] > 0
        return centers[filled], self.sums[1][filled] / self.sums[0][filled]


class PositionSurprisalCurve:
    """Mean surprisal by position in the text, in bins of equal width on a logarithmic axis."""

    def __init__(self) -> None:
        self.sums = np.zeros((3, 64 * BINS_PER_OCTAVE))
        self.num_tokens = 0

    def add(self, nll: NDArray[np.float32]) -> None:
        """Add the surprisal of the next tokens, ``(length,)`` in nats."""
        positions = np.maximum(self.num_tokens + 1.0 + np.arange(len(nll)), MIN_POSITION)
        _add_powers(self.sums, np.floor(np.log2(positions) * BINS_PER_OCTAVE).astype(np.int64), nll.astype(np.float64))
        self.num_tokens += len(nll)

    def points(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the position of each bin (from 1), its mean surprisal and standard error, ``(bins,)`` each."""
        filled = self.sums[0] > 0
        count, total, squares = self.sums[:, filled]
        mean = total / count
        centers = 2 ** ((np.arange(len(filled), dtype=np.float64) + 0.5) / BINS_PER_OCTAVE)
        centers[np.flatnonzero(filled)[:1]] = MIN_POSITION / 2  # The first bin also holds all lower positions.
        return centers[filled], mean, np.sqrt(np.maximum(squares / count - mean**2, 0) / count)


def _add_powers(sums: FloatArray, bins: NDArray[np.int64], values: FloatArray) -> None:
    """Add the powers of ``values`` (counts, values, squares), one per entry of ``sums``, to their bins."""
    for power, power_sums in enumerate(sums):
        power_sums += np.bincount(bins, weights=values**power, minlength=len(power_sums))
