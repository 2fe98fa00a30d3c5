"""Attention on the CPU by a kernel of our own (``attention.cpp``), in float32, forward and backward in one pass each.

torch's fused kernel for the CPU walks every key of a block's rectangle and reads a mask from memory; this one knows
lifetimes, leaves out what nobody of 32 queries sees, and keeps scores, weights and sums in the first two caches. What
comes in bfloat16 is computed in float32 all the same: on CPUs whose bfloat16 instructions only multiply twice as fast
that is faster too, and rounds less. Queries, keys and values are kept for the backward pass as they came. Its operators
have names of their own, so that ``torch.compile`` takes them whole.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import AlibiBias
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.attention.tables import build_key_bounds, get_int32_bounds
from memtx.ops.cpu import cpp_extension

SOURCE_PATH = Path(__file__).parent / "attention.cpp"
BLOCK_SIZE = 32
"""Queries a block, as in the source."""

MIN_QUERIES = 16
"""Queries from which on it is asked: a block is computed whole, however few of its queries there are."""

MAX_HEAD_DIM = 256
"""Of a head, as in the source."""

DTYPES = (torch.float32, torch.bfloat16)
"""Types that it is asked for in."""

HEAD_DIM_MULTIPLE = 16
"""What a head's width is filled up to a multiple of."""


# Both are asked while a model is compiled, not by what it is compiled to.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_faster(dtype: torch.dtype) -> bool:
    """Return whether it is faster than torch's kernels in a type: not in bfloat16 where tiles of it are multiplied."""
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_available() -> bool:
    """Return whether the kernel can be had on this machine; the first call compiles it where it is not yet."""
    return cpp_extension.load_library(SOURCE_PATH) is not None


def _data_ptr(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _int64_array(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _call_kernel(
    name: str,
    tensors: tuple[Tensor | None, ...],
    key_tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    strided_tensors: tuple[Tensor, ...],
    scale: float,
    num_splits: int = 1,
    split_stride: int = 0,
) -> None:
    """Call a function of the source: addresses, then sizes, then the strides of what has heads.

    Args:
        name: of the function.
        tensors: its own, in its order.
        key_tensors: births, ends, ranges, slopes and ticks of the keys.
        strided_tensors: those that have heads, in its order; queries and keys are the first two.
        scale: of the scores.
        num_splits: into which queries are cut.
        split_stride: numbers from one part's gradients to the next one's.
    """
    q, k, *_ = strided_tensors
    born, _, ranges, _, tick = key_tensors
    rows, heads, queries, width = q.shape
    sizes = _int64_array(
        rows, heads, k.shape[1], queries, width, ranges.shape[1],
        born.stride(0) if born.shape[0] > 1 else 0, tick.stride(0) if tick is not None and tick.shape[0] > 1 else 0,
        num_splits, split_stride, torch.get_num_threads(),
    )  # fmt: skip
    strides = _int64_array(*(step for x in strided_tensors for step in x.stride()[:3]))
    library = cpp_extension.load_library(SOURCE_PATH)
    assert library is not None, "the dispatcher asks first"
    getattr(library, name)(*map(_data_ptr, (*tensors, *key_tensors)), sizes, strides, ctypes.c_float(scale))


def _unflatten_key_bounds(flat_key_ranges: list[int], num_queries: int) -> Tensor:
    """Return the table of a list of five integers a key range."""
    fields = zip(*[iter(flat_key_ranges)] * 5, strict=True)
    made = tuple(
        KeyRange(keys, first, stride, None if span < 0 else span, grain) for keys, first, stride, span, grain in fields
    )
    return build_key_bounds(made, num_queries, BLOCK_SIZE, torch.device("cpu"))


def _choose_num_splits(num_units: int, num_blocks: int) -> int:
    """Return into how many parts queries are cut, so that all threads have gradients of keys to make."""
    threads = torch.get_num_threads()
    return 1 if num_units >= threads else min(num_blocks, -(-2 * threads // num_units))


def _to_kernel_layout(x: Tensor) -> Tensor:
    """Return x in float32 with steps of one along its width, as the kernel reads it."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like_heads(x: Tensor, *leading_dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for x's shape (rows, heads, n, width), laid out as (*leading_dims, rows, n, heads, width)."""
    rows, heads, n, width = x.shape
    return x.new_empty(*leading_dims, rows, n, heads, width, dtype=dtype).transpose(-2, -3)


@torch.library.custom_op("memtx::cpu_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, visible_from: Tensor, visible_until: Tensor, slopes: Tensor | None,
    key_offset: Tensor | None, flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_to_kernel_layout, (q, k, v))
    out, lse = _empty_like_heads(q), q.new_empty(q.shape[:3])
    ranges = _unflatten_key_bounds(flat_key_ranges, q.shape[2])
    _call_kernel(
        "memtx_attention_forward", (q, k, v, out, lse), (visible_from, visible_until, ranges, slopes, key_offset),
        (q, k, v, out), scale,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, visible_from: Tensor, visible_until: Tensor, slopes: Tensor | None,
    key_offset: Tensor | None, flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    ranges = _unflatten_key_bounds(flat_key_ranges, q.shape[2])
    parts = _choose_num_splits(q.shape[0] * k.shape[1], ranges.shape[0])
    # Laid out as what they are gradients of, which the projections before them read without a copy.
    grad_q, grad_k, grad_v = (
        _empty_like_heads(q),
        _empty_like_heads(k, parts).zero_(),
        _empty_like_heads(v, parts).zero_(),
    )
    _call_kernel(
        "memtx_attention_backward",
        (q, k, v, out, grad_out, lse, grad_lse, grad_q, grad_k, grad_v),
        (visible_from, visible_until, ranges, slopes, key_offset),
        (q, k, v, out, grad_out, grad_q, grad_k[0], grad_v[0]), scale, parts, grad_k.stride(0),
    )  # fmt: skip
    grad_k, grad_v = (one[0] if parts == 1 else one.sum(0) for one in (grad_k, grad_v))  # A sum would copy.
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    visible_from: Tensor, visible_until: Tensor, slopes: Tensor | None, key_offset: Tensor | None,
    flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_like_heads(q, dtype=q.dtype), _empty_like_heads(k, dtype=q.dtype), _empty_like_heads(v, dtype=q.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.flat_key_ranges, ctx.scale = inputs
    q, k, v, *lives = tensors
    ctx.save_for_backward(q, k, v, *output, *lives)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *lives = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 9
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return *_backward(grad_out, grad_lse, q, k, v, out, lse, *lives, ctx.flat_key_ranges, ctx.scale), *(None,) * 6


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: AlibiBias | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention output and its log-sum-exp, both with gradient; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim) float32 or bfloat16, head_dim up to 256.
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom, by lifetimes alone.
        bias: added to the scaled scores; does not learn.
        scale: factor of the scores.
    """
    assert visibility.pattern is None, "the dispatcher sends patterns elsewhere"
    width, dtype = q.shape[-1], q.dtype
    if more := -width % HEAD_DIM_MULTIPLE:
        q, k, v = (F.pad(x, (0, more)) for x in (q, k, v))
    # As numbers, so that a model whose lengths vary is compiled once, and the table is made outside of it.
    sections = [
        number
        for one in visibility.key_ranges
        for number in (
            one.num_keys,
            one.min_visible_from,
            one.stride,
            -1 if one.max_span is None else one.max_span,
            one.group_size,
        )
    ]
    slopes = tick = None
    if bias is not None:
        slopes = bias.slopes.detach().to(torch.float32).contiguous()
        tick = visibility.memo(("key_offset", bias), lambda: bias.key_offset.to(torch.float32).contiguous())
    out, lse = _forward(q, k, v, *get_int32_bounds(visibility), slopes, tick, sections, scale)
    return out[..., :width].to(dtype), lse
