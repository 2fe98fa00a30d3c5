"""Linear maps in float32 on CPUs where the library behind ``F.linear`` leaves half of the vectors' width unused.

MKL runs kernels of 256 bits on AMD processors with AVX-512. oneDNN, which torch has too, runs 512 there, but in
float32 torch asks it by no linear map of its own: only what its compiler writes does, through an operator that is
asked here as well. Weights and inputs are read as they lie; the gradient of the weights copies its two factors.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.ops.cpu import cpu_info

MIN_MULTIPLY_ADDS = 1 << 21
"""Multiply-adds from which on it pays: below, a call's own cost counts."""


@cache
def is_onednn_faster() -> bool:
    """Return whether this is an AMD processor with AVX-512, as torch uses it, and torch has the operators."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    fit = has and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(fit) and cpu_info.read_cpu_info().get("vendor_id") == "AuthenticAMD"


@cache
def is_onednn_weight_grad_faster() -> bool:
    """Return whether 512 bits are multiplied at once: what is gained on weights' gradients outweighs their copies.

    A Zen 4 (family 25) takes two turns for them; there oneDNN without copies was no faster than MKL.
    """
    family = cpu_info.read_cpu_info().get("cpu family", "")
    return family.isdecimal() and int(family) >= 26


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias; the weight may be a transposed view, x is copied where it is one."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        told, rows = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_weight = None
        if for_weight and is_onednn_weight_grad_faster():
            factors = told.to_mkldnn(), rows.to_mkldnn()
            grad_weight = torch.ops.aten.mkldnn_linear_backward_weights(*factors, weight, False)[0]
        elif for_weight:
            grad_weight = told.T @ rows
        return _onednn_linear(grad_output, weight.T) if for_x else None, grad_weight, told.sum(0) if for_bias else None


def _should_use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[:-1].numel() * weight.numel() >= MIN_MULTIPLY_ADDS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and is_onednn_faster()
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
    if not _should_use_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def accumulate_weight_grad(weight_grad: Tensor, inputs: Tensor, grad_output: Tensor) -> None:
    """Add left' right to a total in place, without gradient: a part of the gradient of weights.

    Args:
        weight_grad: (width, out); faster where the longer of the two lies along memory.
        inputs: (rows, width).
        grad_output: (rows, out).
    """
    if _should_use_onednn(inputs.T, grad_output.T):
        weight_grad += _onednn_linear(inputs.T, grad_output.T)
    elif inputs.dtype == weight_grad.dtype:
        weight_grad.addmm_(inputs.T, grad_output)
    else:
        weight_grad += inputs.T @ grad_output


class Linear(nn.Linear):
    """``nn.Linear`` in everything but who makes its products: :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)
