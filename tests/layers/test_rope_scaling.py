"""Rotary positions with scaled frequencies: relative distances, slowed pairs, invalid numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.layers.positions.base import NoPositions
from memtx.layers.positions.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryFrequencies, YarnScaling

FREQUENCIES: dict[str, Any] = {
    "plain": RotaryFrequencies,
    "linear": partial(LinearScaling, scaling_factor=3.0),
    "llama3": partial(
        Llama3Scaling, scaling_factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=64
    ),
    "yarn": partial(YarnScaling, scaling_factor=4.0, original_max_length=64),
}


def compute_uncached(key: Any, compute: Any) -> Any:
    return compute()


@pytest.mark.parametrize("kind", FREQUENCIES)
@given(key_position=st.integers(0, 10**6), distance=st.integers(0, 500))
def test_relative_keys_equal_absolute_positions_at_that_distance(kind: str, key_position: int, distance: int) -> None:
    rotary = Rotary(2, 16, frequencies=FREQUENCIES[kind])
    q, k = torch.randn(2, 1, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.full((1, 3), float(key_position + distance), dtype=torch.float64)
    expected = rotary.apply_absolute(q, position, compute_uncached) * rotary.apply_absolute(
        k, position - distance, compute_uncached
    )
    actual = q * rotary.apply_relative(k, torch.full((3,), float(distance), dtype=torch.float64))
    # An angle of 1e6 in float64 has an error of 1e-10, summed over 16 products of a few units each.
    torch.testing.assert_close(actual.sum(-1), expected.sum(-1), rtol=0, atol=1e-7)


def test_no_positions_leave_keys_unchanged() -> None:
    k = torch.randn(1, 3, 2, 16)
    assert NoPositions(2, 16).apply_relative(k, torch.ones(3, dtype=torch.float64)) is k


@pytest.mark.parametrize("kind", [kind for kind in FREQUENCIES if kind != "plain"])
def test_slow_pairs_slow_down_and_no_pair_speeds_up(kind: str) -> None:
    device = torch.device("cpu")
    plain, scaled = (FREQUENCIES[name](64, 500000.0).inv_freq(device) for name in ("plain", kind))
    scaling_factor = FREQUENCIES[kind].keywords["scaling_factor"]
    assert (scaled <= plain * (1 + 1e-12)).all()
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / scaling_factor)
    if kind != "linear":
        assert scaled[0] == plain[0]


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        (partial(LinearScaling, scaling_factor=0.0), "scaling_factor is 0"),
        (partial(LinearScaling, scaling_factor=math.nan), "scaling_factor is nan"),
        (
            partial(
                Llama3Scaling, scaling_factor=2.0, low_freq_factor=4.0, high_freq_factor=1.0, original_max_length=8
            ),
            "low_freq_factor is 4",
        ),
        *(
            (
                partial(
                    Llama3Scaling, scaling_factor=2.0, low_freq_factor=low, high_freq_factor=2.0, original_max_length=8
                ),
                f"low_freq_factor is {low}",
            )
            for low in (0.0, 2.0)
        ),
        (partial(YarnScaling, scaling_factor=2.0, original_max_length=0), "original_max_length is 0"),
        (partial(YarnScaling, scaling_factor=2.0, original_max_length=8, beta_slow=-1.0), "beta_slow is -1"),
    ],
)
def test_rejects_invalid_numbers(frequencies: Any, message: str) -> None:
    with pytest.raises(MemtxError, match=message):
        Rotary(2, 16, frequencies=frequencies)
