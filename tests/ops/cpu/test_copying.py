"""The C++ kernel of copied probabilities beside the plain form in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx.memory.recurrent import sliding_window
from memtx.ops import copying
from memtx.ops.attention.mask import Visibility
from memtx.ops.cpu import copying as cpu_copying
from memtx.segment import Segment

pytestmark = pytest.mark.skipif(not cpu_copying.is_available(), reason="needs a C++ compiler")

FLOAT32 = 5e-6
"""Sums of at most 200 products of numbers up to 30."""


def draw_inputs(seed: int, length: int, num_past: int, key_dim: int, scale: float) -> tuple[list[Tensor], Visibility]:
    """Return queries, past keys, keys, next tokens and labels of three streams with documents."""
    torch.manual_seed(seed)
    past_length = torch.randint(0, num_past + 2, (3,))
    segment = Segment.from_document_starts(past_length, length, torch.rand(3, length) < 0.05)
    visibility = sliding_window(segment, num_past, max(2, num_past * 2 // 3), min_age=1).visibility
    q, past_keys, keys = (F.normalize(torch.randn(3, count, key_dim), dim=-1) for count in (length, num_past, length))
    tokens = torch.randint(9, (3, num_past + length)), torch.randint(9, (3, length))
    return [q * scale, past_keys, keys, *tokens], visibility


def outputs_and_gradients(
    compute: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    visibility: Visibility,
    dtype: torch.dtype,
    past_grad: bool,
) -> list[Tensor]:
    """Return the probabilities and best scores where a key is visible, and the gradients of a weighted sum of them."""
    parts = [x.to(dtype, copy=True) for x in inputs[:3]]
    for x, needs_grad in zip(parts, (True, past_grad, True), strict=True):
        x.requires_grad_(needs_grad)
    offset = torch.arange(visibility.num_queries)[None, :, None]
    visible = (visibility.visible_from[:, None] <= offset) & (offset < visibility.visible_until[:, None])
    copied, best = (result * visible.any(-1) for result in compute(*parts, *inputs[3:], visibility))
    generator = torch.Generator().manual_seed(0)
    (copied * torch.randn(copied.shape, generator=generator)).sum().backward()
    return [copied.detach(), best, *(x.grad for x in parts if x.grad is not None)]


@given(
    seed=st.integers(0, 999), length=st.integers(1, 70), num_past=st.sampled_from([0, 1, 5, 96, 130]),
    key_dim=st.sampled_from([3, 16, 48]), scale=st.sampled_from([1.0, 14.5, 30.0]), past_grad=st.booleans(),
)  # fmt: skip
def test_kernel_equals_the_plain_form(
    seed: int, length: int, num_past: int, key_dim: int, scale: float, past_grad: bool
) -> None:
    inputs, visibility = draw_inputs(seed, length, num_past, key_dim, scale)
    plain = copying._CopiedProbability.apply
    expected = outputs_and_gradients(plain, inputs, visibility, torch.float64, past_grad)
    actual = outputs_and_gradients(cpu_copying.copied_probability, inputs, visibility, torch.float32, past_grad)
    for value, reference in zip(actual, expected, strict=True):
        assert torch.allclose(value.double(), reference, rtol=0.0, atol=FLOAT32 * scale)


def test_operator_is_registered_correctly() -> None:
    inputs, visibility = draw_inputs(0, 32, 5, 16, 3.0)
    bounds = (bound.to(torch.int32) for bound in (visibility.visible_from, visibility.visible_until.clamp(max=99)))
    parts = [x.requires_grad_() for x in inputs[:3]]
    tokens = [x.to(torch.int32) for x in inputs[3:]]
    torch.library.opcheck(cpu_copying._forward, (*parts, *tokens, *bounds, True))
