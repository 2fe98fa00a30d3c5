"""A Triton kernel for [prefix | window] keys with intervals, forward and backward, in one pass over all keys.

FlashAttention-2 (Dao 2023) with two integers per key instead of a causal mask. A block of queries visits one range of
keys per static key range. For the gradients of keys and values the ranges are inverted: a block of keys visits the
queries that can see it, so no atomic adds are needed. The bounds depend only on key ranges and lengths, so nothing is
recompiled or copied to the device as the memory fills.

This file is imported only when the backend is used, since the package triton is optional. If TRITON_INTERPRET=1 is set
before the import, it runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from memtx.ops.attention.mask import (
    Visibility,
    build_key_bounds,
    build_query_bounds,
    flatten_key_ranges,
    get_int32_bounds,
    unflatten_key_ranges,
)

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""True if Triton's interpreter runs the kernels, on tensors of any device."""

INT32_MAX = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _load_tile(x, index, stride, dim, mask):  # type: ignore[no-untyped-def]
    """Load a tile (index, dim), zero where masked."""
    return tl.load(x + index.to(tl.int64)[:, None] * stride + dim[None, :], mask=mask[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store_tile(x, index, stride, dim, tile, mask):  # type: ignore[no-untyped-def]
    """Store a tile (index, dim) where not masked, in the dtype of x."""
    address = x + index.to(tl.int64)[:, None] * stride + dim[None, :]
    tl.store(address, tile.to(x.dtype.element_ty), mask=mask[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _compute_scores(q, k, visible_from, visible_until, offset, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scores in base 2, minus infinity where masked: q (M, D), k (N, D) -> (M, N)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    visible = (visible_from[None, :] <= offset[:, None]) & (offset[:, None] < visible_until[None, :])
    return tl.where(visible, scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _load_key_intervals(visible_from, visible_until, key, mask):  # type: ignore[no-untyped-def]
    """Load the intervals of keys; masked keys are never visible."""
    start = tl.load(visible_from + key, mask=mask, other=INT32_MAX)
    return start, tl.load(visible_until + key, mask=mask, other=-INT32_MAX)


@triton.jit  # type: ignore[untyped-decorator]
def _load_lse(lse, index, mask):  # type: ignore[no-untyped-def]
    """Load log-sum-exps in base 2, finite even for fully masked queries."""
    value = tl.load(lse + index, mask=mask, other=0.0)
    return tl.where(value == float("-inf"), 0.0, value) * LOG2E


# Values that change with the segment: specialized, each alignment of them would compile a kernel of its own.
_VARYING = ["num_queries", "num_blocks", "stride_interval"]


@triton.jit  # type: ignore[untyped-decorator]
def _split_program_id(num_blocks, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's block, batch index and head; the grid's other axes end at 65,535."""
    index = tl.program_id(0)
    row = index // num_blocks
    return index % num_blocks, (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, visible_from, visible_until, key_bounds, scale, num_queries, num_blocks, stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_KEY_RANGES: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute output and log-sum-exp of a block of queries."""
    block, batch, head = _split_program_id(num_blocks, HEADS)
    offset = block * M + tl.arange(0, M)
    dim = tl.arange(0, D)
    in_queries = offset < num_queries
    q_tile = _load_tile(q + batch * stride_qb + head * stride_qh, offset, stride_qm, dim, in_queries)
    k += batch * stride_kb + (head // GROUP) * stride_kh
    v += batch * stride_vb + (head // GROUP) * stride_vh
    visible_from += batch * stride_interval
    visible_until += batch * stride_interval
    row_max = tl.full((M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, D), tl.float32)
    for key_range in tl.static_range(NUM_KEY_RANGES):
        low = tl.load(key_bounds + (block * NUM_KEY_RANGES + key_range) * 2)
        high = tl.load(key_bounds + (block * NUM_KEY_RANGES + key_range) * 2 + 1)
        for start in range(low, high, N):
            key = start + tl.arange(0, N)
            in_keys = key < high
            key_start, key_end = _load_key_intervals(visible_from, visible_until, key, in_keys)
            k_tile = _load_tile(k, key, stride_kn, dim, in_keys)
            scores = _compute_scores(q_tile, k_tile, key_start, key_end, offset, scale, PRECISION)
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            # exp2(-inf - -inf) is nan: the maximum of a query that has seen no key yet counts as 0.
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.exp2(scores - finite_max[:, None])
            rescale = tl.exp2(row_max - finite_max)
            row_sum = row_sum * rescale + tl.sum(weights, 1)
            v_tile = _load_tile(v, key, stride_vn, dim, in_keys)
            acc = acc * rescale[:, None]
            acc += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
            row_max = new_max
    fully_masked = row_sum == 0.0
    acc = acc / tl.where(fully_masked, 1.0, row_sum)[:, None]
    _store_tile(out + batch * stride_ob + head * stride_oh, offset, stride_om, dim, acc, in_queries)
    row_lse = (row_max + tl.log2(tl.where(fully_masked, 1.0, row_sum))) / LOG2E
    row_lse = tl.where(fully_masked, float("-inf"), row_lse)
    tl.store(lse + (batch * HEADS + head) * num_queries + offset, row_lse, mask=in_queries)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, grad_out, lse, grad_lse, delta, dq, visible_from, visible_until, key_bounds, scale,
    num_queries, num_blocks, stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    stride_dqb, stride_dqh, stride_dqm,
    HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_KEY_RANGES: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a block of queries; store delta = grad_out . out - grad_lse for `_backward_keys`."""
    block, batch, head = _split_program_id(num_blocks, HEADS)
    offset = block * M + tl.arange(0, M)
    dim = tl.arange(0, D)
    in_queries = offset < num_queries
    q_tile = _load_tile(q + batch * stride_qb + head * stride_qh, offset, stride_qm, dim, in_queries)
    grad_out_tile = _load_tile(grad_out + batch * stride_gb + head * stride_gh, offset, stride_gm, dim, in_queries)
    out_tile = _load_tile(out + batch * stride_ob + head * stride_oh, offset, stride_om, dim, in_queries)
    row = (batch * HEADS + head) * num_queries + offset
    row_lse = _load_lse(lse, row, in_queries)
    row_delta = tl.sum(grad_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + row, mask=in_queries, other=0.0)
    tl.store(delta + row, row_delta, mask=in_queries)
    k += batch * stride_kb + (head // GROUP) * stride_kh
    v += batch * stride_vb + (head // GROUP) * stride_vh
    visible_from += batch * stride_interval
    visible_until += batch * stride_interval
    acc = tl.zeros((M, D), tl.float32)
    for key_range in tl.static_range(NUM_KEY_RANGES):
        low = tl.load(key_bounds + (block * NUM_KEY_RANGES + key_range) * 2)
        high = tl.load(key_bounds + (block * NUM_KEY_RANGES + key_range) * 2 + 1)
        for start in range(low, high, N):
            key = start + tl.arange(0, N)
            in_keys = key < high
            key_start, key_end = _load_key_intervals(visible_from, visible_until, key, in_keys)
            k_tile = _load_tile(k, key, stride_kn, dim, in_keys)
            v_tile = _load_tile(v, key, stride_vn, dim, in_keys)
            scores = _compute_scores(q_tile, k_tile, key_start, key_end, offset, scale, PRECISION)
            weights = tl.exp2(scores - row_lse[:, None])
            grad_weights = tl.dot(grad_out_tile, tl.trans(v_tile), input_precision=PRECISION) - row_delta[:, None]
            acc += tl.dot((weights * grad_weights).to(k_tile.dtype), k_tile, input_precision=PRECISION)
    _store_tile(dq + batch * stride_dqb + head * stride_dqh, offset, stride_dqm, dim, acc * scale, in_queries)


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, grad_out, lse, delta, dk, dv, visible_from, visible_until, query_bounds, scale, num_queries,
    num_blocks, stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a block of keys and values, over all query heads that share them."""
    block, batch, kv_head = _split_program_id(num_blocks, KV_HEADS)
    low = tl.load(query_bounds + block * 4)
    high = tl.load(query_bounds + block * 4 + 1)
    query_start = tl.load(query_bounds + block * 4 + 2)
    query_stop = tl.load(query_bounds + block * 4 + 3)
    key = low + tl.arange(0, N)
    dim = tl.arange(0, D)
    in_keys = key < high
    k_tile = _load_tile(k + batch * stride_kb + kv_head * stride_kh, key, stride_kn, dim, in_keys)
    v_tile = _load_tile(v + batch * stride_vb + kv_head * stride_vh, key, stride_vn, dim, in_keys)
    visible_from += batch * stride_interval
    visible_until += batch * stride_interval
    key_start, key_end = _load_key_intervals(visible_from, visible_until, key, in_keys)
    dk_tile = tl.zeros((N, D), tl.float32)
    dv_tile = tl.zeros((N, D), tl.float32)
    for group_head in range(0, GROUP):
        head = kv_head * GROUP + group_head
        for start in range(query_start, query_stop, M):
            offset = start + tl.arange(0, M)
            in_queries = offset < query_stop
            q_tile = _load_tile(q + batch * stride_qb + head * stride_qh, offset, stride_qm, dim, in_queries)
            grad_out_tile = _load_tile(
                grad_out + batch * stride_gb + head * stride_gh, offset, stride_gm, dim, in_queries
            )  # fmt: skip
            row = (batch * KV_HEADS * GROUP + head) * num_queries + offset
            row_lse = _load_lse(lse, row, in_queries)
            row_delta = tl.load(delta + row, mask=in_queries, other=0.0)
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)
            visible = (key_start[:, None] <= offset[None, :]) & (offset[None, :] < key_end[:, None])
            weights = tl.where(visible & in_queries[None, :], tl.exp2(scores - row_lse[None, :]), 0.0)  # (N, M)
            dv_tile += tl.dot(weights.to(grad_out_tile.dtype), grad_out_tile, input_precision=PRECISION)
            grad_weights = tl.dot(v_tile, tl.trans(grad_out_tile), input_precision=PRECISION) - row_delta[None, :]
            dk_tile += tl.dot((weights * grad_weights).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    _store_tile(dk + batch * stride_dkb + kv_head * stride_dkh, key, stride_dkn, dim, dk_tile * scale, in_keys)
    _store_tile(dv + batch * stride_dvb + kv_head * stride_dvh, key, stride_dvn, dim, dv_tile, in_keys)


def choose_tiles(head_dim: int, dtype: torch.dtype, direction: str) -> dict[str, int]:
    """Return queries (M) and keys (N) per tile, warps and stages that fit an SM's shared memory and registers.

    ``direction`` is "forward", "backward_queries" or "backward_keys".
    """
    if IS_INTERPRETED:
        return {"M": 16, "N": 32}
    if dtype == torch.float32:
        # Without tensor cores every product passes through registers: small tiles, many warps.
        queries = 16 if head_dim == 128 and direction != "forward" else 32
        keys = 16 if head_dim == 128 and direction == "backward_queries" else 32
        num_warps = 4 if (head_dim, direction) in ((64, "forward"), (32, "backward_keys")) else 8
        return {"M": queries, "N": keys, "num_warps": num_warps, "num_stages": 1}
    # Wider tiles spill registers: on Blackwell beside what is loaded of tensor memory, elsewhere than on Hopper beside
    # the addresses of grouped heads.
    arch, num_warps = triton.runtime.driver.active.get_current_target().arch, 8 if head_dim == 128 else 4
    is_blackwell = arch in (100, 103)
    if direction == "forward":
        return {"M": 128, "N": 64, "num_warps": num_warps, "num_stages": 2 if is_blackwell and head_dim < 128 else 3}
    is_narrow = direction == "backward_keys" and (is_blackwell or (arch != 90 and head_dim < 128))
    return {"M": 32 if is_narrow else 64, "N": 64, "num_warps": num_warps, "num_stages": 2}


def _get_strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _get_interval_stride(visible_from: Tensor) -> int:
    return visible_from.stride(0) if visible_from.shape[0] > 1 else 0


def get_dot_precision(dtype: torch.dtype) -> str:
    """Return Triton's name for the precision of products: float32 keeps 24 bits unless the user allows fewer."""
    if dtype != torch.float32:
        return "ieee"
    try:
        allows_tf32 = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # It was set by backend, and torch does not tell the common setting any more.
        allows_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allows_tf32 else "ieee"


def _empty_like_heads(x: Tensor) -> Tensor:
    """Return an empty tensor ``(batch, heads, n, head_dim)``, in memory (batch, n, heads, head_dim) as projections."""
    batch_size, heads, n, head_dim = x.shape
    return x.new_empty(batch_size, n, heads, head_dim).transpose(1, 2)


def _make_rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


# Custom operators, so that torch.compile does not break the graph; settings and tables are read outside it.
@torch.library.custom_op("memtx::triton_attention", mutates_args=())
def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, visible_from: Tensor, visible_until: Tensor, flat_key_ranges: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel; arguments as in :func:`attend`, both ends of the intervals being int32."""
    q, k, v = _make_rows_contiguous(q, k, v)
    batch_size, heads, queries, head_dim = q.shape
    out, lse = _empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tiles, key_ranges = choose_tiles(head_dim, q.dtype, "forward"), unflatten_key_ranges(flat_key_ranges)
    key_bounds = build_key_bounds(key_ranges, queries, tiles["M"], q.device)
    num_blocks = key_bounds.shape[0]
    _forward[(num_blocks * batch_size * heads,)](
        q, k, v, out, lse, visible_from, visible_until, key_bounds, scale, queries, num_blocks,
        _get_interval_stride(visible_from), *_get_strides(q, k, v, out), HEADS=heads, GROUP=heads // k.shape[1],
        NUM_KEY_RANGES=len(key_ranges), D=head_dim, PRECISION=get_dot_precision(q.dtype), **tiles,
    )  # fmt: skip
    return out, lse


@triton_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("memtx::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    visible_from: Tensor, visible_until: Tensor, flat_key_ranges: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels and return the gradients of q, k and v."""
    q, k, v, grad_out = _make_rows_contiguous(q, k, v, grad_out)
    batch_size, heads, queries, head_dim = q.shape
    has_grad_lse = grad_lse is not None
    grad_lse = grad_lse.contiguous().float() if grad_lse is not None else lse
    dq, dk, dv = map(_empty_like_heads, (q, k, v))
    delta = torch.empty_like(lse)
    interval_stride, key_ranges = _get_interval_stride(visible_from), unflatten_key_ranges(flat_key_ranges)
    constants = {"GROUP": heads // k.shape[1], "D": head_dim, "PRECISION": get_dot_precision(q.dtype)}
    tiles = choose_tiles(head_dim, q.dtype, "backward_queries")
    key_bounds = build_key_bounds(key_ranges, queries, tiles["M"], q.device)
    num_blocks = key_bounds.shape[0]
    _backward_queries[(num_blocks * batch_size * heads,)](
        q, k, v, out, grad_out, lse, grad_lse, delta, dq, visible_from, visible_until, key_bounds, scale, queries,
        num_blocks, interval_stride, *_get_strides(q, k, v, out, grad_out, dq),
        HEADS=heads, NUM_KEY_RANGES=len(key_ranges), HAS_GRAD_LSE=has_grad_lse, **constants, **tiles,
    )  # fmt: skip
    tiles = choose_tiles(head_dim, q.dtype, "backward_keys")
    query_bounds = build_query_bounds(key_ranges, queries, tiles["N"], q.device)
    if num_blocks := query_bounds.shape[0]:
        _backward_keys[(num_blocks * batch_size * k.shape[1],)](
            q, k, v, grad_out, lse, delta, dk, dv, visible_from, visible_until, query_bounds, scale, queries,
            num_blocks, interval_stride, *_get_strides(q, k, v, grad_out, dk, dv),
            KV_HEADS=k.shape[1], **constants, **tiles,
        )  # fmt: skip
    return dq, dk, dv


@triton_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, visible_from, visible_until, ctx.flat_key_ranges, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, visible_from, visible_until)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, *saved = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 7
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = triton_attention_backward(grad_out, grad_lse, q, k, v, out, *saved, ctx.flat_key_ranges, ctx.scale)
    return *grads, *(None,) * 4


triton_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp (float32), both with gradient.

    Arguments are those of :func:`memtx.ops.attention.dispatch.segment_attention`, with a head dimension of 32, 64 or
    128 in float32, bfloat16 or float16, and without a pattern.
    """
    assert visibility.pattern is None, "dispatch sends patterns to 'banded'"
    bounds, flat_key_ranges = get_int32_bounds(visibility), flatten_key_ranges(visibility.key_ranges)
    out, lse = triton_attention(q, k, v, *bounds, flat_key_ranges, scale)
    return out, lse
