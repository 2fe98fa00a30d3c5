from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.inference.surprisal_curve import PositionSurprisalCurve, SurprisalCurve


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 200), max_size=8))
def test_curve_keeps_exact_means_in_constant_memory(lengths: list[int]) -> None:
    curve, values = SurprisalCurve(num_bins=8), np.random.default_rng(0).random(sum(lengths)).astype(np.float32)
    for part in np.split(values, np.cumsum(lengths)[:-1] if lengths else []):
        curve.add(part)
    centers, means = curve.points()
    assert curve.sums.shape == (2, 8)
    assert curve.bin_width * 8 >= len(values)
    bins = [values[start : start + curve.bin_width] for start in range(0, len(values), curve.bin_width)]
    # float64 sums in another order.
    np.testing.assert_allclose(means, [content.astype(np.float64).mean() for content in bins], rtol=1e-12)
    np.testing.assert_allclose(centers, (np.arange(len(bins)) + 0.5) * curve.bin_width)


def test_position_curve_is_logarithmic_and_does_not_depend_on_the_segments() -> None:
    values = np.random.default_rng(1).random(5000).astype(np.float32)
    in_one_call, in_segments = PositionSurprisalCurve(), PositionSurprisalCurve()
    in_one_call.add(values)
    for start in range(0, 5000, 37):
        in_segments.add(values[start : start + 37])
    np.testing.assert_allclose(in_one_call.points(), in_segments.points(), rtol=1e-9)
    positions, means, errors = in_one_call.points()
    assert np.all(np.diff(positions) > 0)
    assert positions[-1] < 2 * 5000
    assert in_one_call.sums[0].sum() == 5000
    # The last bin is not exactly the last 500 values, whose mean has a standard deviation of 0.013.
    assert abs(means[-1] - values[-500:].mean()) < 5 * errors[-1] + 0.05


def test_odd_numbers_of_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        SurprisalCurve(num_bins=7)
