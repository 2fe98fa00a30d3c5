"""The C++ kernel of the gated delta rule equals the recurrent rule in float64: outputs, state and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.cpu import delta_rule
from memtx.ops.delta_rule import gated_delta_rule, naive_recurrent_gated_delta_rule

# float32 against float64, relative to the largest value: sums of hundreds of terms.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def _needs_the_kernel() -> None:
    if not delta_rule.is_available():
        pytest.skip("no C++ compiler on this machine")
    return


def naive(q: Tensor, k: Tensor, v: Tensor, *inputs: Any, delta_rule: bool) -> tuple[Tensor, Tensor]:
    q, k = (x.repeat_interleave(v.shape[1] // q.shape[1], dim=1) for x in (q, k))
    return naive_recurrent_gated_delta_rule(q, k, v, *inputs, delta_rule=delta_rule)


def differentiate(function: Any, inputs: list[Any], dtype: torch.dtype, delta_rule: bool) -> list[Tensor]:
    """Return the outputs, and the gradients of a sum of them with fixed weights."""
    inputs = [x.to(dtype).requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs, delta_rule=delta_rule)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(dtype) for x in outputs]
    total = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [*outputs, *torch.autograd.grad(total, leaves)]


@st.composite
def problems(draw: st.DrawFn) -> list[Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch, key_heads, ratio = (draw(st.integers(1, 2)) for _ in range(3))
    length = draw(st.integers(1, 70) | st.sampled_from([128, 129, 200]))
    key_dim, value_dim = draw(st.sampled_from([3, 16, 20])), draw(st.sampled_from([1, 16, 24]))
    heads = key_heads * ratio

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    q, k = (torch.nn.functional.normalize(randn(key_heads, length, key_dim), dim=-1) for _ in range(2))
    strength = torch.rand(batch, heads, length, generator=generator) * 2.0
    decay_shape = draw(st.sampled_from([None, (heads, length), (heads, length, key_dim)]))
    log_decay = None
    if decay_shape is not None:
        log_decay = -draw(st.sampled_from([0.1, 30.0])) * torch.rand(batch, *decay_shape, generator=generator)
    document_starts = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.2]))
    return [
        q,
        k,
        randn(heads, length, value_dim),
        strength,
        log_decay,
        randn(heads, key_dim, value_dim),
        document_starts,
    ]


@given(problems(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_outputs_state_and_gradients_match(inputs: list[Any], delta: bool) -> None:
    expected = differentiate(naive, inputs, torch.float64, delta)
    actual = differentiate(delta_rule.recurrent_gated_delta_rule, inputs, torch.float32, delta)
    for index, (x, reference) in enumerate(zip(actual, expected, strict=True)):
        error = (x - reference).abs().max() / reference.abs().max().clamp(min=1e-3)
        assert error < TOLERANCE, f"output or gradient {index}"


def test_float32_on_the_cpu_uses_the_kernel_and_other_dtypes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(delta_rule, "recurrent_gated_delta_rule", lambda *inputs, **_: calls.append(inputs))
    x, gate, document_starts = torch.rand(1, 2, 5, 4), torch.rand(1, 2, 5), torch.zeros(1, 5, dtype=torch.bool)
    state = torch.zeros(1, 2, 4, 4)
    gated_delta_rule(x, x, x, gate, None, state, document_starts)
    assert len(calls) == 1
    gated_delta_rule(*(part.double() for part in (x, x, x, gate)), None, state.double(), document_starts)
    assert len(calls) == 1


def test_operator_is_registered_correctly() -> None:
    x, gate = torch.rand(1, 2, 40, 16), torch.rand(1, 2, 40)
    inputs = [part.requires_grad_() for part in (x, x.clone(), x.clone(), gate, -gate.detach().clone())]
    state, document_starts = torch.zeros(1, 2, 16, 16), torch.zeros(1, 40, dtype=torch.bool)
    torch.library.opcheck(delta_rule._forward, (*inputs, state, document_starts, True, True))
