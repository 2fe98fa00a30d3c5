from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtx.inference.surprisal_curve import PositionSurprisalCurve, SurprisalCurve


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 200), max_size=8))
def test_a_curve_keeps_exact_means_in_fixed_memory(sizes: list[int]) -> None:
    curve, values = SurprisalCurve(num_bins=8), np.random.default_rng(0).random(sum(sizes)).astype(np.float32)
    for part in np.split(values, np.cumsum(sizes)[:-1] if sizes else []):
        curve.add(part)
    middle, mean = curve.points()
    assert curve.sums.shape == (2, 8)
    assert curve.bin_width * 8 >= len(values)
    parts = [values[i : i + curve.bin_width] for i in range(0, len(values), curve.bin_width)]
    # Sums in float64 in another order.
    np.testing.assert_allclose(mean, [part.astype(np.float64).mean() for part in parts], rtol=1e-12)
    np.testing.assert_allclose(middle, (np.arange(len(parts)) + 0.5) * curve.bin_width)


def test_positions_are_logarithmic_and_independent_of_the_cut() -> None:
    values = np.random.default_rng(1).random(5000).astype(np.float32)
    whole, cut = PositionSurprisalCurve(), PositionSurprisalCurve()
    whole.add(values)
    for start in range(0, 5000, 37):
        cut.add(values[start : start + 37])
    np.testing.assert_allclose(whole.points(), cut.points(), rtol=1e-9)
    position, mean, error = whole.points()
    assert np.all(np.diff(position) > 0)
    assert position[-1] < 2 * 5000
    assert whole.sums[0].sum() == 5000
    assert abs(mean[-1] - values[-500:].mean()) < 5 * error[-1] + 0.05


def test_odd_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        SurprisalCurve(num_bins=7)
