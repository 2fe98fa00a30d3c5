"""A Triton kernel for [prefix | window] keys with lifetimes, forward and backward, in one pass over all keys.

FlashAttention-2 (Dao 2023) with two integers a key in place of a causal mask. A block of queries walks the ranges
of keys that the static sections leave to it, one range a section; for the backward pass of keys and values the
sections are inverted, and a block of keys walks the queries that can see it, so nothing is added atomically. The
ranges depend on sections and lengths alone: nothing is compiled or copied to the device as the memory fills.

This file is imported only when the backend is asked for: the package triton is optional. With
TRITON_INTERPRET=1 set before the import it runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from memtx.ops.attention.mask import Visibility
from memtx.ops.attention.tables import build_key_bounds, build_query_bounds, get_int32_bounds

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on tensors of any device."""

INT32_MAX = tl.constexpr(2**31 - 1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _compute_scores(q, k, visible_from, visible_until, offset, scale, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in base 2, minus infinity where unseen: q (M, D), k (N, D) -> (M, N)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    seen = (visible_from[None, :] <= offset[:, None]) & (offset[:, None] < visible_until[None, :])
    return tl.where(seen, scores, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def _load_key_intervals(visible_from, visible_until, key, high):  # type: ignore[no-untyped-def]
    """Lifetimes of keys; one past the end is never born."""
    inside = key < high
    return tl.load(visible_from + key, mask=inside, other=INT32_MAX), tl.load(
        visible_until + key, mask=inside, other=-INT32_MAX
    )


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, visible_from, visible_until, key_bounds, scale, num_queries, num_keys, stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SECTIONS: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    tick = block * M + tl.arange(0, M)
    wide = tl.arange(0, D)
    within = tick < num_queries
    one = tl.load(
        q + row * stride_qb + head * stride_qh + tick.to(tl.int64)[:, None] * stride_qm + wide[None, :],
        mask=within[:, None], other=0.0,
    )  # fmt: skip
    k += row * stride_kb + (head // GROUP) * stride_kh
    v += row * stride_vb + (head // GROUP) * stride_vh
    visible_from += row * stride_interval
    visible_until += row * stride_interval
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    summed = tl.zeros((M, D), tl.float32)
    for section in tl.static_range(SECTIONS):
        low = tl.load(key_bounds + (block * SECTIONS + section) * 2)
        high = tl.load(key_bounds + (block * SECTIONS + section) * 2 + 1)
        for start in range(low, high, N):
            key = start + tl.arange(0, N)
            inside = (key < high)[:, None]
            at = key.to(tl.int64)[:, None]
            key_born, key_expires = _load_key_intervals(visible_from, visible_until, key, high)
            this = tl.load(k + at * stride_kn + wide[None, :], mask=inside, other=0.0)
            scores = _compute_scores(one, this, key_born, key_expires, tick, scale, PRECISION)
            new = tl.maximum(top, tl.max(scores, 1))
            # exp2(-inf - -inf) is nan: a query that has seen nothing yet is measured from 0.
            base = tl.where(new == float("-inf"), 0.0, new)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(weights, 1)
            value = tl.load(v + at * stride_vn + wide[None, :], mask=inside, other=0.0)
            summed = summed * shrink[:, None]
            summed += tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
            top = new
    blind = total == 0.0
    summed = summed / tl.where(blind, 1.0, total)[:, None]
    tl.store(
        out + row * stride_ob + head * stride_oh + tick.to(tl.int64)[:, None] * stride_om + wide[None, :],
        summed.to(out.dtype.element_ty), mask=within[:, None],
    )  # fmt: skip
    logarithm = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) / LOG2E)
    tl.store(lse + (row * HEADS + head) * num_queries + tick, logarithm, mask=within)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, grad_out, lse, grad_lse, delta, dq, visible_from, visible_until, key_bounds, scale,
    num_queries, num_keys, stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    stride_dqb, stride_dqh, stride_dqm,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SECTIONS: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; leaves delta = grad_out . out - grad_lse for the keys' kernel."""
    block = tl.program_id(0)
    row = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    tick = block * M + tl.arange(0, M)
    wide = tl.arange(0, D)
    within = tick < num_queries
    far = tick.to(tl.int64)[:, None]
    one = tl.load(
        q + row * stride_qb + head * stride_qh + far * stride_qm + wide[None, :], mask=within[:, None], other=0.0
    )  # fmt: skip
    told = tl.load(
        grad_out + row * stride_gb + head * stride_gh + far * stride_gm + wide[None, :], mask=within[:, None], other=0.0
    )  # fmt: skip
    made = tl.load(
        out + row * stride_ob + head * stride_oh + far * stride_om + wide[None, :], mask=within[:, None], other=0.0
    )  # fmt: skip
    place = (row * HEADS + head) * num_queries + tick
    own = tl.load(lse + place, mask=within, other=0.0)
    own = tl.where(own == float("-inf"), 0.0, own) * LOG2E
    balance = tl.sum(told.to(tl.float32) * made.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        balance -= tl.load(grad_lse + place, mask=within, other=0.0)
    tl.store(delta + place, balance, mask=within)
    k += row * stride_kb + (head // GROUP) * stride_kh
    v += row * stride_vb + (head // GROUP) * stride_vh
    visible_from += row * stride_interval
    visible_until += row * stride_interval
    summed = tl.zeros((M, D), tl.float32)
    for section in tl.static_range(SECTIONS):
        low = tl.load(key_bounds + (block * SECTIONS + section) * 2)
        high = tl.load(key_bounds + (block * SECTIONS + section) * 2 + 1)
        for start in range(low, high, N):
            key = start + tl.arange(0, N)
            inside = (key < high)[:, None]
            at = key.to(tl.int64)[:, None]
            key_born, key_expires = _load_key_intervals(visible_from, visible_until, key, high)
            this = tl.load(k + at * stride_kn + wide[None, :], mask=inside, other=0.0)
            value = tl.load(v + at * stride_vn + wide[None, :], mask=inside, other=0.0)
            weights = tl.exp2(_compute_scores(one, this, key_born, key_expires, tick, scale, PRECISION) - own[:, None])
            change = tl.dot(told, tl.trans(value), input_precision=PRECISION) - balance[:, None]
            summed += tl.dot((weights * change).to(this.dtype), this, input_precision=PRECISION)
    tl.store(
        dq + row * stride_dqb + head * stride_dqh + far * stride_dqm + wide[None, :],
        (summed * scale).to(dq.dtype.element_ty), mask=within[:, None],
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, grad_out, lse, delta, dk, dv, visible_from, visible_until, query_bounds, scale, num_queries,
    stride_interval,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, over all query heads that share them."""
    block = tl.program_id(0)
    row = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    low = tl.load(query_bounds + block * 4)
    high = tl.load(query_bounds + block * 4 + 1)
    from_tick = tl.load(query_bounds + block * 4 + 2)
    to_tick = tl.load(query_bounds + block * 4 + 3)
    key = low + tl.arange(0, N)
    wide = tl.arange(0, D)
    inside = (key < high)[:, None]
    at = key.to(tl.int64)[:, None]
    this = tl.load(k + row * stride_kb + kv_head * stride_kh + at * stride_kn + wide[None, :], mask=inside, other=0.0)
    value = tl.load(v + row * stride_vb + kv_head * stride_vh + at * stride_vn + wide[None, :], mask=inside, other=0.0)
    key_born, key_expires = _load_key_intervals(
        visible_from + row * stride_interval, visible_until + row * stride_interval, key, high
    )
    sum_k = tl.zeros((N, D), tl.float32)
    sum_v = tl.zeros((N, D), tl.float32)
    for shared in range(0, GROUP):
        head = kv_head * GROUP + shared
        for start in range(from_tick, to_tick, M):
            tick = start + tl.arange(0, M)
            within = tick < to_tick
            far = tick.to(tl.int64)[:, None]
            one = tl.load(
                q + row * stride_qb + head * stride_qh + far * stride_qm + wide[None, :],
                mask=within[:, None], other=0.0,
            )  # fmt: skip
            told = tl.load(
                grad_out + row * stride_gb + head * stride_gh + far * stride_gm + wide[None, :],
                mask=within[:, None], other=0.0,
            )  # fmt: skip
            place = (row * KV_HEADS * GROUP + head) * num_queries + tick
            own = tl.load(lse + place, mask=within, other=0.0)
            own = tl.where(own == float("-inf"), 0.0, own) * LOG2E
            balance = tl.load(delta + place, mask=within, other=0.0)
            scores = tl.dot(this, tl.trans(one), input_precision=PRECISION) * (scale * LOG2E)
            seen = (key_born[:, None] <= tick[None, :]) & (tick[None, :] < key_expires[:, None]) & within[None, :]
            weights = tl.where(seen, tl.exp2(scores - own[None, :]), 0.0)  # (N, M)
            sum_v += tl.dot(weights.to(told.dtype), told, input_precision=PRECISION)
            change = tl.dot(value, tl.trans(told), input_precision=PRECISION) - balance[None, :]
            sum_k += tl.dot((weights * change).to(one.dtype), one, input_precision=PRECISION)
    tl.store(
        dk + row * stride_dkb + kv_head * stride_dkh + at * stride_dkn + wide[None, :],
        (sum_k * scale).to(dk.dtype.element_ty), mask=inside,
    )  # fmt: skip
    tl.store(
        dv + row * stride_dvb + kv_head * stride_dvh + at * stride_dvn + wide[None, :],
        sum_v.to(dv.dtype.element_ty), mask=inside,
    )  # fmt: skip


def _choose_tiles(head_dim: int, dtype: torch.dtype, direction: str) -> dict[str, int]:
    """Return queries (M) and keys (N) a tile, warps and stages, within an SM's shared memory and registers."""
    if IS_INTERPRETED:
        return {"M": 16, "N": 32}
    if dtype == torch.float32:
        # Without tensor cores every product passes through registers: small tiles, many warps.
        return {"M": 32, "N": 32, "num_warps": 8 if head_dim == 128 else 4, "num_stages": 1}
    if direction == "forward":
        return {"M": 128, "N": 64, "num_warps": 8 if head_dim == 128 else 4, "num_stages": 3}
    return {"M": 64, "N": 64, "num_warps": 8 if head_dim == 128 else 4, "num_stages": 2}


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        rows, heads, queries, head_dim = q.shape
        born, expires = get_int32_bounds(visibility)
        # Laid out as (rows, queries, heads, head_dim), which the projection after it reads without a copy.
        out = q.new_empty(rows, queries, heads, head_dim).transpose(1, 2)
        lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
        tiles = _choose_tiles(head_dim, q.dtype, "forward")
        ranges = build_key_bounds(visibility.key_ranges, queries, tiles["M"], q.device)
        ctx.constants = {
            "GROUP": heads // k.shape[1],
            "D": head_dim,
            # Products of float32 keep their 24 bits unless the user has allowed fewer for all products.
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }
        _forward[(ranges.shape[0], rows * heads)](
            q, k, v, out, lse, born, expires, ranges, scale, queries, k.shape[2],
            born.stride(0) if born.shape[0] > 1 else 0, *_strides(q, k, v, out),
            HEADS=heads, SECTIONS=len(visibility.key_ranges), **ctx.constants, **tiles,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, born, expires)
        ctx.key_ranges, ctx.scale = visibility.key_ranges, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, born, expires = ctx.saved_tensors
        rows, heads, queries, head_dim = q.shape
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
        told = grad_lse is not None
        grad_lse = grad_lse.contiguous().float() if grad_lse is not None else lse
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
        delta = torch.empty_like(lse)
        life_row = born.stride(0) if born.shape[0] > 1 else 0
        tiles = _choose_tiles(head_dim, q.dtype, "backward")
        ranges = build_key_bounds(ctx.key_ranges, queries, tiles["M"], q.device)
        _backward_queries[(ranges.shape[0], rows * heads)](
            q, k, v, out, grad_out, lse, grad_lse, delta, dq, born, expires, ranges, ctx.scale, queries, k.shape[2],
            life_row, *_strides(q, k, v, out, grad_out, dq),
            HEADS=heads, SECTIONS=len(ctx.key_ranges), HAS_GRAD_LSE=told, **ctx.constants, **tiles,
        )  # fmt: skip
        blocks = build_query_bounds(ctx.key_ranges, queries, tiles["N"], q.device)
        if blocks.shape[0]:
            _backward_keys[(blocks.shape[0], rows * k.shape[1])](
                q, k, v, grad_out, lse, delta, dk, dv, born, expires, blocks, ctx.scale, queries, life_row,
                *_strides(q, k, v, grad_out, dk, dv), KV_HEADS=k.shape[1], **ctx.constants, **tiles,
            )  # fmt: skip
        return dq, dk, dv, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention output and its log-sum-exp (float32), both with gradient; shapes as in the reference.

    Args:
        q: (rows, heads, queries, head_dim), head_dim 32, 64 or 128; float32, bfloat16 or float16.
        k: (rows, kv_heads, keys, head_dim).
        v: (rows, kv_heads, keys, head_dim).
        visibility: who sees whom, by lifetimes alone.
        scale: factor of the scores.
    """
    assert visibility.pattern is None, "the dispatcher sends patterns elsewhere"
    out, lse = _TritonAttention.apply(q, k, v, visibility, scale)  # type: ignore[no-untyped-call]
    return out, lse
