"""Rotary embedding: only differences of positions matter, lengths stay, far streams lose nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.rotary import apply_rotary_emb, rotary_angles_from_base

BASE = 10_000.0


def scores(query: Tensor, key: Tensor, at: float, shift: float, dtype: torch.dtype = torch.float64) -> Tensor:
    q, k = (
        apply_rotary_emb(
            x, rotary_angles_from_base(torch.tensor([[place]], dtype=torch.float64), x.shape[-1], BASE, dtype)
        )
        for x, place in ((query, at + shift), (key, shift))
    )
    return (q * k).sum(-1)


@given(st.integers(0, 2**31), st.floats(0, 1000), st.floats(-1e5, 1e5))
@settings(deadline=None, max_examples=40)
def test_relative_only(seed: int, distance: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 3, 16, dtype=torch.float64, generator=generator)
    # An angle of 1e5 in float64 is off by 1e-11; sums of 16 products of a few units each.
    torch.testing.assert_close(scores(q, k, distance, shift), scores(q, k, distance, 0.0), rtol=0, atol=1e-8)


def test_angles_are_exact_far_out_even_for_float32() -> None:
    tick = torch.tensor([[1e7 + 0.5]], dtype=torch.float64)
    single, double = (rotary_angles_from_base(tick, 16, BASE, dtype) for dtype in (torch.float32, torch.float64))
    # Rounding of the result alone: float32 has 2^-24.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-7)


def test_is_the_paper_s_rotation() -> None:
    """Equation 34, by its matrices of two rows."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    tick = torch.randn(2, 5, dtype=torch.float64) * 9
    truth = torch.empty_like(x)
    for row, entry, i in itertools.product(range(2), range(5), range(4)):
        angle = tick[row, entry] * BASE ** (-2 * i / 8)
        matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
        truth[row, entry, :, 2 * i : 2 * i + 2] = x[row, entry, :, 2 * i : 2 * i + 2] @ matrix.T
    turn = rotary_angles_from_base(tick, 8, BASE, torch.float64)
    # Rounding of numbers of a few units in float64.
    torch.testing.assert_close(apply_rotary_emb(x, turn), truth, rtol=0, atol=1e-12)
    compiled = torch.compile(apply_rotary_emb, backend="eager")
    torch.testing.assert_close(compiled(x, turn), truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeps_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 2, 8).to(dtype)
    assert apply_rotary_emb(x, rotary_angles_from_base(torch.arange(4)[None], 8, BASE, torch.float32)).dtype == dtype
