"""Gated DeltaNet between its projections: the kernel equals the torch form in float64, with every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.memory.gated_delta_net import GatedDeltaNet
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

    document_starts = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    past_length = torch.randint(0, 6, (batch,), generator=generator)
    segment = Segment.from_document_starts(past_length, length, document_starts)
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


def example(length: int = 150, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return a problem of two heads that share keys."""
    shapes = ((2, length, 64), (2, length, 32), (2, length, 2), (2, length, 2), (2, 3, 64), (2, 2, 16, 16), (64, 1, 4))
    tensors = [torch.randn(shape, dtype=dtype) for shape in (*shapes, (2,), (2,), (16,))]
    tensors[5] = tensors[5].float()
    position = torch.arange(length).expand(2, -1) % 100
    return {"tensors": tensors, "position": position, "valid_length": None, "options": {}}


def test_bfloat16_is_rounded_at_inputs_and_outputs_only() -> None:
    problem = example(dtype=torch.bfloat16)
    expected = compute(plain_gated_delta_net, problem, torch.float64)
    tensors = [x.clone().requires_grad_() for x in problem["tensors"]]
    out, state = gated_delta_net(*tensors[:6], problem["position"], None, DeltaNetWeights(*tensors[6:]))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (state - expected[1]).abs().max() < TOLERANCE * expected[1].abs().max()
    # Half a unit in the last of 8 bits.
    assert (out - expected[0]).abs().max() < 2**-8 * expected[0].abs().max()
    grads = torch.autograd.grad(out.float().sum() + state.sum(), tensors)
    assert [grad.dtype for grad in grads] == [x.dtype for x in tensors]


def test_other_dtypes_and_decays_by_channel_take_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(kernel, "fused_gated_delta_net", lambda *inputs, **_: calls.append(inputs))
    for dtype, num_calls in ((torch.float32, 1), (torch.float64, 1)):
        problem = example(8, dtype)
        tensors = [x.to(dtype) for x in problem["tensors"]]
        gated_delta_net(*tensors[:6], problem["position"], None, DeltaNetWeights(*tensors[6:]))
        assert len(calls) == num_calls
    tensors = example(8)["tensors"]
    tensors[3], tensors[7] = torch.randn(2, 8, 32), torch.randn(32)
    out, _ = gated_delta_net(*tensors[:6], problem["position"], None, DeltaNetWeights(*tensors[6:]))
    assert out.shape == (2, 8, 32)
    assert len(calls) == 1


def test_operators_pass_opcheck() -> None:
    problem = example(40)
    tensors = [x.requires_grad_() for x in problem["tensors"]]
    # The fourth check compiles with varying shapes, for half a minute.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = (*tensors, problem["position"], None, [2.0, 1e-6], True)
    torch.library.opcheck(kernel._forward, inputs, test_utils=checks)


def test_compiled_and_autocast_layers_match_the_plain_ones() -> None:
    memory = GatedDeltaNet(32, heads=2, key_heads=1)
    x = torch.randn(2, 40, 32)
    segment = Segment.from_document_starts(torch.zeros(2, dtype=torch.int64), 40)
    state = memory.init_state(2, like=x)
    expected, _ = memory.mix(state, x, segment)
    compiled = torch.compile(memory.mix, backend="aot_eager", fullgraph=True)
    out, _ = compiled(state, x, segment)
    assert (out - expected).abs().max() < TOLERANCE
    (grad,) = torch.autograd.grad(out.sum(), memory.conv_weight)
    (reference,) = torch.autograd.grad(expected.sum(), memory.conv_weight)
    assert (grad - reference).abs().max() < TOLERANCE * reference.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, next_state = memory.mix(state, x, segment)
    assert next_state.matrix.dtype == torch.float32
    # bfloat16 projections of 8 bits
    assert (rounded - expected).abs().max() < 0.03 * expected.abs().max()


def test_reading_in_chunks_without_gradient_changes_nothing() -> None:
    memory = GatedDeltaNet(16, heads=2)
    x = torch.randn(1, 2500, 16)
    document_starts = torch.zeros(1, 2500, dtype=torch.bool)
    document_starts[0, [1024, 1025, 2047]] = True
    segment = Segment.from_document_starts(torch.zeros(1, dtype=torch.int64), 2500, document_starts)
    state = memory.init_state(1, like=x)
    expected, expected_state = memory.mix(state, x, segment)
    with torch.no_grad():
        out, next_state = memory.mix(state, x, segment)
    assert (out - expected).abs().max() < TOLERANCE
    assert (next_state.matrix - expected_state.matrix).abs().max() < TOLERANCE
    assert torch.equal(next_state.conv_inputs, expected_state.conv_inputs)
