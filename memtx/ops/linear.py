"""Linear maps in float32 on CPUs where the library behind ``F.linear`` leaves half of the vectors' width unused.

MKL runs kernels of 256 bits on AMD processors with AVX-512. oneDNN, which torch has too, runs 512 there, but torch
asks it for float32 by no linear map, only by convolutions. A map is a convolution of width 1 over channels that lie
beside each other in memory, so nothing is copied. The gradient of the weights is made by MKL, which is as fast there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops import processor

FEWEST = 256
"""Rows from which on it pays: below, a call's own cost counts."""


@cache
def cpu_gains() -> bool:
    """Return whether this is an AMD processor with AVX-512, as torch uses it."""
    has = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    fit = has and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(fit) and processor.about().get("vendor_id") == "AuthenticAMD"


def _channels_last(x: Tensor) -> Tensor:
    """(n, width) -> (1, width, n, 1), the same memory."""
    return x[None, :, None].permute(0, 3, 1, 2)


class _ByConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        out = F.conv2d(_channels_last(rows), weight[..., None, None], bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows, told = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if for_x:
            grad_x = torch.ops.aten.convolution_backward(
                _channels_last(told), _channels_last(rows), weight[..., None, None], None,
                [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False],
            )[0].permute(0, 2, 3, 1).reshape(x.shape)  # fmt: skip
        return grad_x, told.T @ rows if for_weight else None, told.sum(0) if for_bias else None


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[:-1].numel() >= FEWEST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and cpu_gains()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias as ``F.linear`` does, the faster way of the processor.

    Args:
        x: (..., width).
        weight: (out, width).
        bias: (out,), or None.

    Returns:
        (..., out).
    """
    if not _pays(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _ByConvolution.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out
