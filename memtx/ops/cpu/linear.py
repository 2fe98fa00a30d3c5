"""Linear maps in float32 on CPUs where the library behind ``F.linear`` uses half the vector width.

On AMD processors with AVX-512, MKL runs 256-bit kernels and oneDNN 512-bit ones. In float32 torch calls oneDNN only
from compiled code, through an operator that this file calls too. Weights and inputs are read without a copy; the weight
gradient copies its two factors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.ops.cpu import cpu_info

MIN_MULTIPLY_ADDS = 1 << 21
"""Minimum number of multiply-adds for oneDNN; below it, call overhead dominates."""


@cache
def is_onednn_faster() -> bool:
    """Return True on AMD processors with AVX-512, if torch uses it and has the oneDNN operators."""
    has_operators = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    has_avx512 = has_operators and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return bool(has_avx512) and cpu_info.read_cpu_info().get("vendor_id") == "AuthenticAMD"


@cache
def is_onednn_weight_grad_faster() -> bool:
    """Return True if the CPU has full 512-bit units, whose gain for weight gradients outweighs the copies.

    Zen 4 (family 25) needs two cycles per operation: its oneDNN is no faster than MKL even without copies.
    """
    family = cpu_info.read_cpu_info().get("cpu family", "")
    return family.isdecimal() and int(family) >= 26


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias; weight may be a transposed view, while a transposed x is copied."""
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
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat_grad, flat_x = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_weight = None
        if needs_weight and is_onednn_weight_grad_faster():
            factors = flat_grad.to_mkldnn(), flat_x.to_mkldnn()
            grad_weight = torch.ops.aten.mkldnn_linear_backward_weights(*factors, weight, False)[0]
        elif needs_weight:
            grad_weight = flat_grad.T @ flat_x
        grad_x = _onednn_linear(grad_output, weight.T) if needs_x else None
        return grad_x, grad_weight, flat_grad.sum(0) if needs_bias else None


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
    """Compute ``F.linear`` with the faster library for this CPU."""
    if not _should_use_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def accumulate_weight_grad(weight_grad: Tensor, inputs: Tensor, grad_output: Tensor) -> None:
    """Add inputs' grad_output to ``weight_grad`` in place, without autograd.

    ``inputs`` is ``(tokens, in_features)`` and ``grad_output`` ``(tokens, out_features)``; this is faster if the longer
    dimension of ``weight_grad``, ``(in_features, out_features)``, is contiguous.
    """
    if _should_use_onednn(inputs.T, grad_output.T):
        weight_grad += _onednn_linear(inputs.T, grad_output.T)
    elif inputs.dtype == weight_grad.dtype:
        weight_grad.addmm_(inputs.T, grad_output)
    elif weight_grad.is_cuda and weight_grad.dtype == torch.float32:
        # Half-precision factors are summed in float32, without a rounded product beside the sum.
        if torch.compiler.is_compiling():  # Inductor has no addmm of two dtypes
            weight_grad += torch.mm(inputs.T, grad_output, out_dtype=torch.float32)
        else:
            torch.addmm(weight_grad, inputs.T, grad_output, out_dtype=torch.float32, out=weight_grad)
    else:
        weight_grad += inputs.T @ grad_output


class Linear(nn.Linear):
    """``nn.Linear`` computed by :func:`linear`."""

    __call__: Callable[..., Tensor]  # nn.Module declares Any

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return linear(x, self.weight, self.bias)
