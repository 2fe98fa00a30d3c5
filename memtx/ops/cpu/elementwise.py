"""The gated unit of SwiGLU and RMS norms on the CPU in float32, by a C++ kernel (``elementwise.cpp``).

In torch each is several passes over memory, whose intermediates are stored for the backward pass; here it is one pass,
and the backward pass computes them again. Under ``torch.compile`` the compiler does the same to the torch form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "elementwise.cpp"
MIN_NUMBERS = 1 << 16
"""Minimum size of an input; below it, call overhead dominates."""


def is_available() -> bool:
    """Return True if the kernel runs on this machine; the first call compiles it if needed."""
    return cpp_extension.is_available(SOURCE_PATH)


def _is_fused(*tensors: Tensor) -> bool:
    return (
        tensors[0].numel() >= MIN_NUMBERS
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and is_available()
    )


def _call_kernel(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function of the source; the number of threads is appended."""
    cpp_extension.call(SOURCE_PATH, name, *arguments, torch.get_num_threads())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _call_kernel("memtx_swiglu_forward", gate_up, out, out.shape[:-1].numel(), out.shape[-1])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        width = grad_out.shape[-1]
        _call_kernel("memtx_swiglu_backward", grad_out.contiguous(), gate_up, grad, grad_out.shape[:-1].numel(), width)
        return grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # A view where the rows are equally far apart, as those of a part of the heads' channels.
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        ctx.save_for_backward(flat, weight)
        ctx.eps = eps
        out = x.new_empty(x.shape)
        _call_kernel("memtx_rms_norm_forward", flat, weight.contiguous(), out, *flat.shape, flat.stride(0), eps)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight = ctx.saved_tensors
        parts = torch.get_num_threads()
        grad_x, grad_weight = grad_out.new_empty(grad_out.shape), weight.new_zeros(parts, *weight.shape)
        _call_kernel(
            "memtx_rms_norm_backward", grad_out.contiguous(), flat, weight.contiguous(), grad_x, grad_weight,
            *flat.shape, flat.stride(0), ctx.eps, parts,
        )  # fmt: skip
        return grad_x, grad_weight.sum(0), None


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``SiLU(gate) * up``, ``(..., width)``, for gate and up side by side, ``(..., 2 * width)``."""
    if _is_fused(gate_up):
        out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``F.rms_norm`` over the last dimension of x ``(..., width)``; weight: ``(width,)``."""
    if _is_fused(x, weight):
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return F.rms_norm(x, weight.shape, weight, eps)
