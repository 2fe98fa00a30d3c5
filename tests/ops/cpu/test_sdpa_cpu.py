"""Bands on the CPU: exactness of the bfloat16 backward pass, and compiling without a graph break."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memtx.ops.attention import reference
from memtx.ops.attention.banded import build_bands
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu import sdpa_cpu
from tests.ops.attention.test_backends import causal_window, check_compiled_gradients


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bf16_backward_error_is_close_to_the_fused_kernels(
    spread: float, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spreads range from uniform weights to one key with all the weight."""
    torch.manual_seed(0)
    offset = torch.arange(-60, 150)[None]
    end = torch.where(offset % 7 == 0, -100, offset + 60)
    visibility = Visibility(offset, end, 150, (KeyRange(210, -60, 1, 60),))
    shapes = ((4, 150), (kv_heads, 210), (kv_heads, 210))
    q, k, v = (torch.randn(2, heads, length, 32).bfloat16() for heads, length in shapes)
    q = q * spread
    out_weight, lse_weight = torch.randn(2, 4, 150, 32), torch.randn(2, 4, 150)
    bands = build_bands(visibility, None, 64, torch.float32)

    def compute_grads(exact: bool) -> tuple[Tensor, ...]:
        inputs = [(x.double() if exact else x).clone().requires_grad_() for x in (q, k, v)]
        if exact:
            out, lse = reference.attend(*inputs, visibility, scale=32**-0.5)
        else:
            out, lse = sdpa_cpu.attend(*inputs, bands, 32**-0.5)
        loss = (out * out_weight.bfloat16()).sum() + (lse * lse_weight).sum()
        return torch.autograd.grad(loss, inputs)

    expected_grads = compute_grads(exact=True)
    monkeypatch.setattr(sdpa_cpu, "is_bf16_backward_faster", lambda: False)
    fused_grads = compute_grads(exact=False)
    monkeypatch.setattr(sdpa_cpu, "is_bf16_backward_faster", lambda: True)
    grads = compute_grads(exact=False)
    assert not all(torch.equal(grad, fused) for grad, fused in zip(grads, fused_grads, strict=True))
    for grad, fused, expected in zip(grads, fused_grads, expected_grads, strict=True):
        # Rounding to 8 bits is 0.1% of a tensor's norm each time, and it happens once or twice more.
        assert (grad - expected).norm() <= 2 * (fused - expected).norm() + 1e-3 * expected.norm()


def test_compiled_bands_have_no_graph_break() -> None:
    q, k, v = (torch.randn(2, 2, 300, 16, requires_grad=True) for _ in range(3))
    visibility = causal_window(300, window=200)
    check_compiled_gradients(q, k, v, visibility, "banded")
