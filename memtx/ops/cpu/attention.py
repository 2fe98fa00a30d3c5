"""Attention on the CPU by a C++ kernel (``attention.cpp``), forward and backward in one pass each.

torch's fused CPU kernel visits every key of a block's rectangle and reads a mask from memory. This kernel evaluates the
intervals, skips keys that none of 32 queries sees, and keeps scores, weights and sums in the L1 and L2 caches. It
computes in float32 even for bfloat16 inputs: this rounds less, and is faster on CPUs whose bfloat16 instructions are
only twice as fast. Queries, keys and values are saved for the backward pass in their own dtype. Both passes are
custom operators, so ``torch.compile`` does not break the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import AlibiBias
from memtx.ops.attention.mask import (
    Visibility,
    build_key_bounds,
    flatten_key_ranges,
    get_int32_bounds,
    unflatten_key_ranges,
)
from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "attention.cpp"
DTYPES = (torch.float32, torch.bfloat16)
BLOCK_SIZE, MAX_HEAD_DIM = 32, 256
"""Queries per block and maximum head dimension, as in the source."""

MIN_QUERIES = 16
"""Minimum number of queries for the backend "auto": a block with fewer queries costs the same."""

HEAD_DIM_MULTIPLE = 16
"""Head dimensions are padded to a multiple of this."""


# Both functions are evaluated while a model is compiled and become constants of the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_faster(dtype: torch.dtype) -> bool:
    """Return True if the kernel is faster than torch's for ``dtype``: always, except for bfloat16 on CPUs with AMX."""
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return True if the kernel runs on this machine; the first call compiles it if needed."""
    return cpp_extension.is_available(SOURCE_PATH)


def _call_kernel(
    name: str, tensors: tuple[Tensor | None, ...],
    key_tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], strided_tensors: tuple[Tensor, ...],
    scale: float, num_splits: int = 1, split_stride: int = 0,
) -> None:  # fmt: skip
    """Call a function of the source with addresses, sizes and strides; tensors are in the order of its parameters.

    ``key_tensors`` are both ends of the intervals, key bounds, slopes and key offsets; ``strided_tensors`` are those
    with heads, q and k first. Queries are split into ``num_splits`` parts, whose gradients are ``split_stride`` apart.
    """
    q, k, *_ = strided_tensors
    visible_from, _, key_bounds, _, key_offset = key_tensors
    batch_size, heads, queries, head_dim = q.shape
    interval_stride = visible_from.stride(0) if visible_from.shape[0] > 1 else 0
    offset_stride = key_offset.stride(0) if key_offset is not None and key_offset.shape[0] > 1 else 0
    sizes = (
        batch_size, heads, k.shape[1], queries, head_dim, key_bounds.shape[1], interval_stride, offset_stride,
        num_splits, split_stride, torch.get_num_threads(),
    )  # fmt: skip
    strides = [stride for x in strided_tensors for stride in x.stride()[:3]]
    cpp_extension.call(SOURCE_PATH, name, *tensors, *key_tensors, sizes, strides, scale)


def _unflatten_key_bounds(flat_key_ranges: list[int], num_queries: int) -> Tensor:
    """Build the table of key bounds from a list of five integers per key range."""
    return build_key_bounds(unflatten_key_ranges(flat_key_ranges), num_queries, BLOCK_SIZE, torch.device("cpu"))


def _choose_num_splits(num_units: int, num_blocks: int) -> int:
    """Return the number of parts to split queries into, so that all threads have key gradients to compute."""
    threads = torch.get_num_threads()
    return 1 if num_units >= threads else min(num_blocks, -(-2 * threads // num_units))


def _to_kernel_layout(x: Tensor) -> Tensor:
    """Return x in float32 with stride 1 in the last dimension."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like_heads(x: Tensor, *leading_dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an empty (*leading_dims, batch, heads, n, head_dim) tensor, in memory (..., batch, n, heads, head_dim)."""
    batch_size, heads, n, head_dim = x.shape
    return x.new_empty(*leading_dims, batch_size, n, heads, head_dim, dtype=dtype).transpose(-2, -3)


@torch.library.custom_op("memtx::cpu_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, visible_from: Tensor, visible_until: Tensor, slopes: Tensor | None,
    key_offset: Tensor | None, flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_to_kernel_layout, (q, k, v))
    out, lse = _empty_like_heads(q), q.new_empty(q.shape[:3])
    key_tensors = (visible_from, visible_until, _unflatten_key_bounds(flat_key_ranges, q.shape[2]), slopes, key_offset)
    _call_kernel("memtx_attention_forward", (q, k, v, out, lse), key_tensors, (q, k, v, out), scale)
    return out, lse


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("memtx::cpu_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    visible_from: Tensor, visible_until: Tensor, slopes: Tensor | None, key_offset: Tensor | None,
    flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v, grad_out = map(_to_kernel_layout, (q, k, v, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    key_bounds = _unflatten_key_bounds(flat_key_ranges, q.shape[2])
    num_splits = _choose_num_splits(q.shape[0] * k.shape[1], key_bounds.shape[0])
    # Laid out like their inputs, so that the backward of the projections reads them without a copy.
    grad_q = _empty_like_heads(q)
    grad_k, grad_v = _empty_like_heads(k, num_splits).zero_(), _empty_like_heads(v, num_splits).zero_()
    _call_kernel(
        "memtx_attention_backward",
        (q, k, v, out, grad_out, lse, grad_lse, grad_q, grad_k, grad_v),
        (visible_from, visible_until, key_bounds, slopes, key_offset),
        (q, k, v, out, grad_out, grad_q, grad_k[0], grad_v[0]), scale, num_splits, grad_k.stride(0),
    )  # fmt: skip
    # A sum of one part would copy.
    grad_k, grad_v = (grad[0] if num_splits == 1 else grad.sum(0) for grad in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like_heads(q, dtype=q.dtype), _empty_like_heads(k, dtype=q.dtype), _empty_like_heads(v, dtype=q.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.flat_key_ranges, ctx.scale = inputs
    q, k, v, *key_tensors = tensors
    ctx.save_for_backward(q, k, v, *output, *key_tensors)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *key_tensors = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 9
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _backward(grad_out, grad_lse, q, k, v, out, lse, *key_tensors, ctx.flat_key_ranges, ctx.scale)
    return *grads, *(None,) * 6


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: AlibiBias | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp, both with gradient.

    Arguments are those of :func:`memtx.ops.attention.dispatch.segment_attention`, in a dtype of DTYPES, with a head
    dimension up to MAX_HEAD_DIM, without a pattern and without gradient of the bias.
    """
    assert visibility.pattern is None, "dispatch sends patterns to 'banded'"
    head_dim, dtype = q.shape[-1], q.dtype
    if padding := -head_dim % HEAD_DIM_MULTIPLE:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    slopes = key_offset = None
    if bias is not None:
        slopes = bias.slopes.detach().to(torch.float32).contiguous()
        key_offset = visibility.memo(("key_offset", bias), lambda: bias.key_offset.to(torch.float32).contiguous())
    bounds, flat_key_ranges = get_int32_bounds(visibility), flatten_key_ranges(visibility.key_ranges)
    out, lse = _forward(q, k, v, *bounds, slopes, key_offset, flat_key_ranges, scale)
    return out[..., :head_dim].to(dtype), lse
