"""Linear maps by oneDNN equal those of ``F.linear``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.ops.cpu import linear as linear_module

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN operators"
)


@needs_onednn
@pytest.mark.parametrize("onednn_weight_grad", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_onednn_linear_equals_f_linear(
    has_bias: bool, onednn_weight_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "is_onednn_weight_grad_faster", lambda: onednn_weight_grad)

    @given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70), st.booleans())
    def check(length: int, in_features: int, out_features: int, transposed: bool) -> None:
        torch.manual_seed(length)
        shape = (2, in_features, length) if transposed else (2, length, in_features)
        x = torch.randn(shape).transpose(1, 2) if transposed else torch.randn(shape)
        inputs = [x.requires_grad_(), torch.randn(out_features, in_features).requires_grad_()]
        inputs += [torch.randn(out_features).requires_grad_()] if has_bias else []
        grad_out = torch.randn(2, length, out_features)
        out = linear_module._OneDNNLinear.apply(*inputs, *([] if has_bias else [None]))  # type: ignore[no-untyped-call]
        double = [x.detach().double().requires_grad_() for x in inputs]
        expected = F.linear(*double)
        # Sums of up to 600 products of normal numbers: about 2^-24 of 600^(1/2) times their size, with a margin.
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
        grads = torch.autograd.grad(out, inputs, grad_out)
        expected_grads = torch.autograd.grad(expected, double, grad_out.double())
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            # Sums of up to 600 products, as above.
            torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=1e-4)

    check()


@needs_onednn
def test_frozen_inputs_get_no_gradient() -> None:
    x, weight = torch.randn(300, 8), torch.randn(4, 8, requires_grad=True)
    linear_module._OneDNNLinear.apply(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert weight.grad is not None


def test_onednn_is_used_for_large_float32_products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "is_onednn_faster", lambda: True)
    weight, x = torch.randn(4, 8), torch.randn(linear_module.MIN_MULTIPLY_ADDS // 32, 8)
    assert linear_module._should_use_onednn(x, weight)
    assert not linear_module._should_use_onednn(x[1:], weight)
    assert not linear_module._should_use_onednn(x.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not linear_module._should_use_onednn(x, weight)
        assert linear_module.linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(linear_module, "is_onednn_faster", lambda: False)
    assert not linear_module._should_use_onednn(x, weight)


@pytest.mark.parametrize("use_onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_grad_is_accumulated_in_place(
    use_onednn: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "is_onednn_faster", lambda: use_onednn)
    inputs, grad_output, initial = torch.randn(300, 64), torch.randn(300, 128), torch.randn(64, 128)
    expected = initial.double() + inputs.double().T @ grad_output.double()
    weight_grad = initial.T.contiguous().T if transposed else initial
    linear_module.accumulate_weight_grad(weight_grad, inputs, grad_output)
    # Sums of 300 products of normal numbers.
    torch.testing.assert_close(weight_grad.double(), expected, rtol=0, atol=1e-4)
