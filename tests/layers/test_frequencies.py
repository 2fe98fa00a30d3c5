"""Rotary positions with scaled frequencies: keys seen from a distance, one base for all, wrong numbers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memtx.errors import MemtxError
from memtx.layers.frequencies import Frequencies, LinearScaling, Llama3Scaling, YarnScaling
from memtx.layers.positions import NoPositions, Rotary

MADE: dict[str, Any] = {
    "plain": Frequencies,
    "linear": partial(LinearScaling, stretch=3.0),
    "llama3": partial(Llama3Scaling, stretch=8.0, low=1.0, high=4.0, trained=64),
    "yarn": partial(YarnScaling, stretch=4.0, trained=64),
}


def alone(key: Any, make: Any) -> Any:
    return make()


@pytest.mark.parametrize("kind", MADE)
@given(at=st.integers(0, 10**6), distance=st.integers(0, 500))
def test_keys_seen_from_a_distance_are_those_of_positions_so_far_apart(kind: str, at: int, distance: int) -> None:
    rotary = Rotary(2, 16, frequencies=MADE[kind])
    q, k = torch.randn(2, 1, 3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = torch.full((1, 3), float(at + distance), dtype=torch.float64)
    expected = rotary.placed(q, place, alone) * rotary.placed(k, place - distance, alone)
    found = q * rotary.apart(k, torch.full((3,), float(distance), dtype=torch.float64))
    # An angle of 1e6 in float64 is off by 1e-10; sums of 16 products of a few units each.
    torch.testing.assert_close(found.sum(-1), expected.sum(-1), rtol=0, atol=1e-7)


def test_no_positions_see_keys_as_they_are() -> None:
    k = torch.randn(1, 3, 2, 16)
    assert NoPositions(2, 16).apart(k, torch.ones(3, dtype=torch.float64)) is k


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "plain"])
def test_slow_pairs_are_slowed_down_and_no_pair_turns_faster(kind: str) -> None:
    device = torch.device("cpu")
    plain, scaled = (MADE[one](64, 500000.0).inverse(device) for one in ("plain", kind))
    stretch = MADE[kind].keywords["stretch"]
    assert (scaled <= plain * (1 + 1e-12)).all()
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / stretch)
    if kind != "linear":
        assert scaled[0] == plain[0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (partial(LinearScaling, stretch=0.0), "stretch is 0"),
        (partial(LinearScaling, stretch=math.nan), "stretch is nan"),
        (partial(Llama3Scaling, stretch=2.0, low=4.0, high=1.0, trained=8), "low is 4"),
        (partial(YarnScaling, stretch=2.0, trained=0), "trained is 0"),
        (partial(YarnScaling, stretch=2.0, trained=8, slow=-1.0), "slow is -1"),
    ],
)
def test_refuses(make: Any, says: str) -> None:
    with pytest.raises(MemtxError, match=says):
        Rotary(2, 16, frequencies=make)
