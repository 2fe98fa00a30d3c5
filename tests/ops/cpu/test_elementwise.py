"""SwiGLU's unit and RMS norms by the C++ kernel equal torch's in float64, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from memtx.layers.block import Block
from memtx.layers.feed_forward import SwiGLU
from memtx.layers.norms import ZeroCenteredRMSNorm
from memtx.layers.token_mixer import TokenMixer
from memtx.memory.gated_delta_net import GatedDeltaNet
from memtx.ops.cpu import elementwise
from memtx.segment import Segment

# float32 against float64, relative to the largest value.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True, scope="module")
def _needs_the_kernel() -> None:
    if not elementwise.is_available():
        pytest.skip("no C++ compiler on this machine")


@pytest.fixture(autouse=True)
def _small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "MIN_NUMBERS", 1)


def check(function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare a function in float32 with a reference in float64, outputs and gradients."""
    results = []
    for call, dtype in ((function, torch.float32), (reference, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = call(*leaves)
        weight = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).reshape(out.shape).to(dtype)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for x, expected in zip(*results, strict=True):
        assert x.shape == expected.shape
        assert (x - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1.0) * len(x) ** 0.5


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_swiglu_matches(length: int, width: int, seed: int) -> None:
    gate_up = 4 * torch.randn(2, length, 2 * width, generator=torch.Generator().manual_seed(seed))

    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    check(elementwise.swiglu, reference, gate_up)


@given(st.integers(1, 5), st.integers(2, 40), st.booleans(), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_rms_norm_matches_also_for_parts_of_heads(length: int, width: int, is_part: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # The gradient of the norm of a single number, or of tiny ones, is a difference of nearly equal numbers.
    x = torch.randn(2, length, 3, 2 * width, generator=generator)
    x = x + x.sign()
    weight = torch.randn(width, generator=generator)

    def select(x: Tensor) -> Tensor:
        return x[..., :width] if is_part else x[..., :width].contiguous()

    check(
        lambda x, weight: elementwise.rms_norm(select(x), weight, 1e-5),
        lambda x, weight: F.rms_norm(select(x), (width,), weight, 1e-5),
        x,
        weight,
    )


def test_extreme_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -200.0, 1.0, 2.0, 3.0]], requires_grad=True)
    out = elementwise.swiglu(gate_up)
    assert torch.allclose(out, torch.tensor([[0.0, 2e4, 0.0]]))
    assert torch.autograd.grad(out.sum(), gate_up)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_torch_form(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(elementwise.swiglu(x), F.silu(gate) * up)
    weight = torch.randn(8, dtype=dtype)
    assert torch.equal(elementwise.rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))


def test_block_in_chunks_without_gradient_changes_nothing() -> None:
    block = Block(TokenMixer(GatedDeltaNet(16, heads=2)), SwiGLU(16), ZeroCenteredRMSNorm(16), ZeroCenteredRMSNorm(16))
    x = torch.randn(2, 1300, 16)
    segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), 1300)
    state = (block.attention.memory.init_state(2, like=x),)
    expected, *_ = block(x, state, segment)
    before = x.clone()
    with torch.no_grad():
        out, *_ = block(x, state, segment)
    assert (out - expected).abs().max() < 1e-5
    assert torch.equal(x, before)
