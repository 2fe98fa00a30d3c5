"""Linear maps by the processor's faster way are the same maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from memtx.ops.cpu import linear as by

onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no products by oneDNN"
)


@onednn
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_onednn_makes_the_same_map(biased: bool, copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by, "is_onednn_weight_grad_faster", lambda: copies)

    @given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 70), st.booleans())
    def check(rows: int, width: int, out: int, turned: bool) -> None:
        torch.manual_seed(rows)
        x = torch.randn(2, width, rows).transpose(1, 2) if turned else torch.randn(2, rows, width)
        inputs = [x.requires_grad_(), torch.randn(out, width).requires_grad_()]
        inputs += [torch.randn(out).requires_grad_()] if biased else []
        told = torch.randn(2, rows, out)
        found = by._OneDNNLinear.apply(*inputs, *([] if biased else [None]))  # type: ignore[no-untyped-call]
        double = [one.detach().double().requires_grad_() for one in inputs]
        truth = F.linear(*double)
        # Sums of up to 600 products of normal numbers: some 2^-24 of 600^(1/2) times their size, and room.
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
        for own, exact in zip(
            torch.autograd.grad(found, inputs, told), torch.autograd.grad(truth, double, told.double()), strict=True
        ):
            torch.testing.assert_close(own.double(), exact, rtol=0, atol=1e-3)

    check()


@onednn
def test_what_does_not_learn_gets_no_gradient() -> None:
    x, weight = torch.randn(300, 8), torch.randn(4, 8, requires_grad=True)
    by._OneDNNLinear.apply(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert weight.grad is not None


def test_only_many_rows_of_float32_go_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by, "is_onednn_faster", lambda: True)
    weight, many = torch.randn(4, 8), torch.randn(by.MIN_MULTIPLY_ADDS // 32, 8)
    assert by._should_use_onednn(many, weight)
    assert not by._should_use_onednn(many[1:], weight)
    assert not by._should_use_onednn(many.double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not by._should_use_onednn(many, weight)
        assert by.linear(many, weight).dtype == torch.bfloat16
    monkeypatch.setattr(by, "is_onednn_faster", lambda: False)
    assert not by._should_use_onednn(many, weight)


@pytest.mark.parametrize("gains", [False, pytest.param(True, marks=onednn)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_product_is_added(gains: bool, turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by, "is_onednn_faster", lambda: gains)
    left, right, total = torch.randn(300, 64), torch.randn(300, 128), torch.randn(64, 128)
    truth = total.double() + left.double().T @ right.double()
    found = total.T.contiguous().T if turned else total
    by.accumulate_weight_grad(found, left, right)
    # Sums of 300 products of normal numbers.
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-4)
