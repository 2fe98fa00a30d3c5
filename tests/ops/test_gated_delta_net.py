"""Gated DeltaNet between its projections: the kernel equals the torch form in float64, with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.cpu import gated_delta_net as kernel
from memtx.ops.gated_delta_net import DeltaNetWeights, gated_delta_net, plain_gated_delta_net
from memtx.segment import Segment

# float32 against float64, relative to the largest value: sums of hundreds of terms.
TOLERANCE = 3e-5
NAMES = ("out", "state", "qkv", "gate", "write", "decay", "conv_inputs", "matrix", "conv_weight", "decay_bias",
         "log_decay_rate", "norm_weight")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _needs_the_kernel() -> None:
    if not kernel.is_available():
        pytest.skip("no C++ compiler on this machine")


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch, key_heads, ratio = (draw(st.integers(1, 2)) for _ in range(3))
    length = draw(st.integers(1, 40) | st.sampled_from([64, 129, 170]))
    key_dim, value_dim, conv_size = (
        draw(st.sampled_from([3, 16, 20])),
        draw(st.sampled_from([1, 16, 24])),
        draw(st.integers(1, 4)),
    )
    heads = key_heads * ratio
    channels = 2 * key_heads * key_dim + heads * value_dim

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    starts = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    past_length = torch.randint(0, 6, (batch,), generator=generator)
    segment = Segment.from_document_starts(past_length, length, starts)
    has_padding = draw(st.booleans())
    valid_length = torch.randint(0, length + 1, (batch,), generator=generator) if has_padding else None
    tensors = [
        randn(batch, length, channels), randn(batch, length, heads * value_dim), randn(batch, length, heads),
        randn(batch, length, heads) * draw(st.sampled_from([1.0, 8.0])), randn(batch, conv_size - 1, channels),
        randn(batch, heads, key_dim, value_dim), randn(channels, 1, conv_size) * conv_size**-0.5,
        randn(heads) - 2.0, randn(heads), randn(value_dim),
    ]  # fmt: skip
    options = {"max_write": draw(st.sampled_from([1.0, 2.0])), "norm_eps": 1e-5}
    return {"tensors": tensors, "position": segment.position, "valid_length": valid_length, "options": options}


def compute(function: Any, problem: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs of the valid tokens, the state, and the gradients of a sum of both with fixed weights."""
    tensors = [x.to(dtype, copy=True).requires_grad_() for x in problem["tensors"]]
    *inputs, state = tensors[:6]
    arguments = (*inputs, state, problem["position"], problem["valid_length"], DeltaNetWeights(*tensors[6:]))
    out, state = function(*arguments, **problem["options"])
    if problem["valid_length"] is not None:
        index = torch.arange(out.shape[1])
        out = out.masked_fill((index >= problem["valid_length"][:, None])[..., None], 0.0)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in (out, state)]
    total = sum((x * weight).sum() for x, weight in zip((out, state), weights, strict=True))
    return [out, state, *torch.autograd.grad(total, tensors, materialize_grads=True)]


@given(problems())
@settings(max_examples=60, deadline=None)
def test_outputs_state_and_gradients_match(problem: dict[str, Any]) -> None:
    expected = compute(plain_gated_delta_net, problem, torch.float64)
    actual = compute(gated_delta_net, problem, torch.float32)
    for name, x, reference in zip(NAMES, actual, expected, strict=True):
        if reference.numel():
            error = (x - reference).abs().max() / reference.abs().max().clamp(min=1e-2)
            assert error < TOLERANCE, name
