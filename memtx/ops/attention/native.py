"""Attention on the CPU by a kernel of our own (``window.cpp``), in float32, forward and backward in one pass each.

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

from memtx.ops import compiled
from memtx.ops.attention.bias import Bias
from memtx.ops.attention.tables import key_ranges, lifetimes
from memtx.ops.visibility import Section, Visibility

SOURCE = Path(__file__).parent / "window.cpp"
BLOCK = 32
"""Queries a block, as in the source."""

FEWEST = 16
"""Queries from which on it is asked: a block is computed whole, however few of its queries there are."""

WIDEST = 256
"""Of a head, as in the source."""

TYPES = (torch.float32, torch.bfloat16)
"""Types that it is asked for in."""

LANES = 16
"""What a head's width is filled up to a multiple of."""


# Both are asked while a model is compiled, not by what it is compiled to.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_faster(dtype: torch.dtype) -> bool:
    """Return whether it is faster than torch's kernels in a type: not in bfloat16 where tiles of it are multiplied."""
    return dtype == torch.float32 or not torch.cpu._is_amx_tile_supported()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def there() -> bool:
    """Return whether the kernel can be had on this machine; the first call compiles it where it is not yet."""
    return compiled.library(SOURCE) is not None


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _integers(*values: int) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _call(
    name: str,
    tensors: tuple[Tensor | None, ...],
    lives: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    strided: tuple[Tensor, ...],
    scale: float,
    parts: int = 1,
    part_size: int = 0,
) -> None:
    """Call a function of the source: addresses, then sizes, then the strides of what has heads.

    Args:
        name: of the function.
        tensors: its own, in its order.
        lives: births, ends, ranges, slopes and ticks of the keys.
        strided: those that have heads, in its order; queries and keys are the first two.
        scale: of the scores.
        parts: into which queries are cut.
        part_size: numbers from one part's gradients to the next one's.
    """
    q, k, *_ = strided
    born, _, ranges, _, tick = lives
    rows, heads, queries, width = q.shape
    sizes = _integers(
        rows, heads, k.shape[1], queries, width, ranges.shape[1],
        born.stride(0) if born.shape[0] > 1 else 0, tick.stride(0) if tick is not None and tick.shape[0] > 1 else 0,
        parts, part_size, torch.get_num_threads(),
    )  # fmt: skip
    strides = _integers(*(step for x in strided for step in x.stride()[:3]))
    library = compiled.library(SOURCE)
    assert library is not None, "the dispatcher asks first"
    getattr(library, name)(*map(_address, (*tensors, *lives)), sizes, strides, ctypes.c_float(scale))


def _ranges(sections: list[int], queries: int) -> Tensor:
    """Return the table of a list of five integers a section."""
    fields = zip(*[iter(sections)] * 5, strict=True)
    made = tuple(
        Section(keys, first, stride, None if span < 0 else span, grain) for keys, first, stride, span, grain in fields
    )
    return key_ranges(made, queries, BLOCK, torch.device("cpu"))


def _parts(units: int, blocks: int) -> int:
    """Return into how many parts queries are cut, so that all threads have gradients of keys to make."""
    threads = torch.get_num_threads()
    return 1 if units >= threads else min(blocks, -(-2 * threads // units))


def _read(x: Tensor) -> Tensor:
    """Return x in float32 with steps of one along its width, as the kernel reads it."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_heads(x: Tensor, *first: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return memory for x's shape (rows, heads, n, width), laid out as (*first, rows, n, heads, width)."""
    rows, heads, n, width = x.shape
    return x.new_empty(*first, rows, n, heads, width, dtype=dtype).transpose(-2, -3)


@torch.library.custom_op("memtx::window_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, born: Tensor, expires: Tensor, slopes: Tensor | None, tick: Tensor | None,
    sections: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = map(_read, (q, k, v))
    out, lse = _like_heads(q), q.new_empty(q.shape[:3])
    ranges = _ranges(sections, q.shape[2])
    _call(
        "memtx_attention_forward", (q, k, v, out, lse), (born, expires, ranges, slopes, tick), (q, k, v, out), scale
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, born: Tensor, expires: Tensor, slopes: Tensor | None, tick: Tensor | None,
    sections: list[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("memtx::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, born: Tensor,
    expires: Tensor, slopes: Tensor | None, tick: Tensor | None, sections: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v, grad = map(_read, (q, k, v, grad))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    ranges = _ranges(sections, q.shape[2])
    parts = _parts(q.shape[0] * k.shape[1], ranges.shape[0])
    # Laid out as what they are gradients of, which the projections before them read without a copy.
    grad_q, grad_k, grad_v = _like_heads(q), _like_heads(k, parts).zero_(), _like_heads(v, parts).zero_()
    _call(
        "memtx_attention_backward",
        (q, k, v, out, grad, lse, grad_lse, grad_q, grad_k, grad_v), (born, expires, ranges, slopes, tick),
        (q, k, v, out, grad, grad_q, grad_k[0], grad_v[0]), scale, parts, grad_k.stride(0),
    )  # fmt: skip
    grad_k, grad_v = (one[0] if parts == 1 else one.sum(0) for one in (grad_k, grad_v))  # A sum would copy.
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)


@_backward.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, born: Tensor,
    expires: Tensor, slopes: Tensor | None, tick: Tensor | None, sections: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like_heads(q, dtype=q.dtype), _like_heads(k, dtype=q.dtype), _like_heads(v, dtype=q.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sections, ctx.scale = inputs
    q, k, v, *lives = tensors
    ctx.save_for_backward(q, k, v, *output, *lives)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *lives = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 9
    grad = torch.zeros_like(out) if grad is None else grad
    return *_backward(grad, grad_lse, q, k, v, out, lse, *lives, ctx.sections, ctx.scale), *(None,) * 6


_forward.register_autograd(_differentiate, setup_context=_keep)


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: Bias | None = None, scale: float
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
    if more := -width % LANES:
        q, k, v = (F.pad(x, (0, more)) for x in (q, k, v))
    # As numbers, so that a model whose lengths vary is compiled once, and the table is made outside of it.
    sections = [
        number
        for one in visibility.sections
        for number in (one.keys, one.first, one.stride, -1 if one.span is None else one.span, one.grain)
    ]
    slopes = tick = None
    if bias is not None:
        slopes = bias.slopes.detach().to(torch.float32).contiguous()
        tick = visibility.once(("tick", bias), lambda: bias.tick.to(torch.float32).contiguous())
    out, lse = _forward(q, k, v, *lifetimes(visibility), slopes, tick, sections, scale)
    return out[..., :width].to(dtype), lse
