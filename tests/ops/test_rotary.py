"""Rotary embedding: only position differences matter, the dtype is kept, and distant positions lose no precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.rotary import apply_rotary_emb, rotary_angles

BASE = 10_000.0


def angles(offset: Tensor, head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return cosines and sines with the frequencies of the paper."""
    inv_freq = BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return rotary_angles(offset, inv_freq, dtype)


def rotated_dot_product(query: Tensor, key: Tensor, distance: float, shift: float) -> Tensor:
    q, k = (
        apply_rotary_emb(x, angles(torch.tensor([[position]], dtype=torch.float64), x.shape[-1]))
        for x, position in ((query, distance + shift), (key, shift))
    )
    return (q * k).sum(-1)


@given(st.integers(0, 2**31), st.floats(0, 1000), st.floats(-1e5, 1e5))
@settings(deadline=None, max_examples=40)
def test_scores_depend_on_distance_only(seed: int, distance: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 3, 16, dtype=torch.float64, generator=generator)
    # The error of an angle of 1e5 in float64 is 1e-11; sums of 16 products of a few units each.
    shifted, unshifted = rotated_dot_product(q, k, distance, shift), rotated_dot_product(q, k, distance, 0.0)
    torch.testing.assert_close(shifted, unshifted, rtol=0, atol=1e-8)


def test_distant_angles_are_exact_in_float32() -> None:
    offset = torch.tensor([[1e7 + 0.5]], dtype=torch.float64)
    single, double = (angles(offset, 16, dtype) for dtype in (torch.float32, torch.float64))
    # Only the result is rounded: float32 has 2^-24.
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-7)


def test_rotation_matches_equation_34() -> None:
    """Compared with the paper's 2 x 2 rotation matrices."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    offset = torch.randn(2, 5, dtype=torch.float64) * 9
    expected = torch.empty_like(x)
    for index, entry, i in itertools.product(range(2), range(5), range(4)):
        angle = offset[index, entry] * BASE ** (-2 * i / 8)
        matrix = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
        expected[index, entry, :, 2 * i : 2 * i + 2] = x[index, entry, :, 2 * i : 2 * i + 2] @ matrix.T
    cos_sin = angles(offset, 8)
    # Rounding of numbers of a few units in float64.
    torch.testing.assert_close(apply_rotary_emb(x, cos_sin), expected, rtol=0, atol=1e-12)
    compiled = torch.compile(apply_rotary_emb, backend="eager")
    torch.testing.assert_close(compiled(x, cos_sin), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotation_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 2, 8).to(dtype)
    assert apply_rotary_emb(x, angles(torch.arange(4)[None], 8, torch.float32)).dtype == dtype
