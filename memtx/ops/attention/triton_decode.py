"""A Triton kernel for one token per stream: rotate, write the token into its ring buffers, and attend to the slots.

As in FlashDecoding (Dao et al. 2023), the slots of a stream are split among programs, and the parts merged by their
log-sum-exp, so that a single stream fills a GPU. The token itself is never read from the ring, into which another
program writes it meanwhile.

This file is imported only when the kernel is used, since the package triton is optional.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

SLOTS_PER_STEP = 64
"""Slots that a program loads at a time."""

MIN_PROGRAMS = 264
"""Programs to split the slots into: two for each multiprocessor of a large GPU."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit  # type: ignore[untyped-decorator]
def _load_rotated(x, cos_sin, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, IS_ROTATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a head (2 * HALF,) and rotate its pairs; rounded to its dtype, as elsewhere, and returned in float32."""
    pair = tl.arange(0, HALF)
    mask = 2 * pair < HEAD_DIM
    first = tl.load(x + 2 * pair, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + 2 * pair + 1, mask=mask, other=0.0).to(tl.float32)
    if IS_ROTATED:
        cosine = tl.load(cos_sin + 2 * pair, mask=mask, other=0.0)
        sine = tl.load(cos_sin + 2 * pair + 1, mask=mask, other=0.0)
        rotated = tl.interleave(first * cosine - second * sine, second * cosine + first * sine)
    else:
        rotated = tl.interleave(first, second)
    return rotated.to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["num_slots", "num_splits", "width"])  # type: ignore[untyped-decorator]
def _attend_slots(  # type: ignore[no-untyped-def]
    q, k, v, cos_sin, x, hidden, key_value, slot, visible, out, lse, scale, num_slots, num_splits, width,
    stride_qb, stride_kb, stride_vb, stride_xb, stride_cb, stride_hb, stride_rb, stride_rs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr,
    IS_ROTATED: tl.constexpr,
):  # fmt: skip
    """Attend from one head to one part of a stream's slots; the first part adds and writes the token itself."""
    split = tl.program_id(0) % num_splits
    row = tl.program_id(0) // num_splits
    batch = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    kv_head = head // (HEADS // KV_HEADS)
    dim = tl.arange(0, 2 * HALF)
    in_head = dim < HEAD_DIM
    angles = cos_sin + batch * stride_cb
    query = _load_rotated(q + batch * stride_qb + head * HEAD_DIM, angles, HEAD_DIM, HALF, IS_ROTATED) * scale
    token_slot = tl.load(slot + batch)
    keys = key_value + batch * stride_rb + kv_head * HEAD_DIM
    values = keys + KV_HEADS * HEAD_DIM
    row_max = tl.full((), float("-inf"), tl.float32)
    row_sum = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((2 * HALF,), tl.float32)
    if split == 0:
        key = _load_rotated(k + batch * stride_kb + kv_head * HEAD_DIM, angles, HEAD_DIM, HALF, IS_ROTATED)
        value = tl.load(v + batch * stride_vb + kv_head * HEAD_DIM + dim, mask=in_head, other=0.0).to(tl.float32)
        row_max = tl.sum(query * key, 0) * LOG2E
        row_sum += 1.0
        acc = value
        if head % (HEADS // KV_HEADS) == 0:
            address = token_slot * stride_rs + dim
            tl.store(keys + address, key.to(key_value.dtype.element_ty), mask=in_head)
            tl.store(values + address, value.to(key_value.dtype.element_ty), mask=in_head)
        if head == 0:
            for start in range(0, width, 1024):
                channel = start + tl.arange(0, 1024)
                inputs = tl.load(x + batch * stride_xb + channel, mask=channel < width, other=0.0)
                address = hidden + batch * stride_hb + token_slot * width + channel
                tl.store(address, inputs.to(hidden.dtype.element_ty), mask=channel < width)
    steps = tl.cdiv(num_slots, N)
    for step in range(split, steps, num_splits):
        index = step * N + tl.arange(0, N)
        in_slots = index < num_slots
        seen = tl.load(visible + batch * num_slots + index, mask=in_slots, other=0) != 0
        seen = seen & (index != token_slot)
        address = index.to(tl.int64)[:, None] * stride_rs + dim[None, :]
        mask = seen[:, None] & in_head[None, :]
        key_tile = tl.load(keys + address, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(key_tile * query[None, :], 1) * LOG2E, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        # exp2(-inf - -inf) is nan: the maximum of a part without visible slots counts as 0.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - finite_max)
        rescale = tl.exp2(row_max - finite_max)
        value_tile = tl.load(values + address, mask=mask, other=0.0).to(tl.float32)
        acc = acc * rescale + tl.sum(weights[:, None] * value_tile, 0)
        row_sum = row_sum * rescale + tl.sum(weights, 0)
        row_max = new_max
    is_empty = row_sum == 0.0
    acc = acc / tl.where(is_empty, 1.0, row_sum)
    part = row.to(tl.int64) * num_splits + split
    tl.store(out + part * HEAD_DIM + dim, acc.to(out.dtype.element_ty), mask=in_head)
    tl.store(lse + part, tl.where(is_empty, float("-inf"), row_max + tl.log2(tl.where(is_empty, 1.0, row_sum))))


@triton.jit(do_not_specialize=["num_splits"])  # type: ignore[untyped-decorator]
def _merge_parts(parts, lse, out, num_splits, HEAD_DIM: tl.constexpr, D: tl.constexpr, MAX_SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Merge the parts of one head; the first part sees the token itself, so the sum of weights is positive."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    dim = tl.arange(0, D)
    part_lse = tl.load(lse + row * num_splits + split, mask=split < num_splits, other=float("-inf"))
    weights = tl.exp2(part_lse - tl.max(part_lse, 0))
    mask = (split < num_splits)[:, None] & (dim < HEAD_DIM)[None, :]
    address = (row * num_splits + split)[:, None] * HEAD_DIM + dim[None, :]
    part_out = tl.load(parts + address, mask=mask, other=0.0)
    merged = tl.sum(part_out * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * HEAD_DIM + dim, merged.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def choose_num_splits(num_heads: int, num_slots: int) -> int:
    """Return the number of parts of each of ``num_heads`` heads of all streams: enough to fill a GPU."""
    return max(1, min(MIN_PROGRAMS // num_heads, -(-num_slots // SLOTS_PER_STEP), 64))


@torch.library.custom_op("memtx::attend_ring", mutates_args=("hidden", "key_value"))
def attend_ring(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor | None, x: Tensor, hidden: Tensor, key_value: Tensor,
    slot: Tensor, visible: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """Write one token per stream into its ring and return its attention, ``(batch, heads, head_dim)``.

    Args:
        q: ``(batch, heads, head_dim)``, without positions.
        k: ``(batch, kv_heads, head_dim)``, without positions.
        v: ``(batch, kv_heads, head_dim)``.
        cos_sin: ``(batch, head_dim / 2, 2)`` float32, the rotation of queries and keys; None for none.
        x: ``(batch, dim)``, the layer's normalized input.
        hidden: ``(batch, slots, dim)``; the input is written at ``slot``.
        key_value: ``(batch, slots, 2, kv_heads, head_dim)``; the rotated key and the value are written at ``slot``.
        slot: ``(batch,)`` int64, each token's slot.
        visible: ``(batch, slots)`` bool, the slots that the token sees.
        scale: Factor of the scores.
    """
    q, k, v, x = (part if part[0].is_contiguous() else part.contiguous() for part in (q, k, v, x))
    batch_size, heads, head_dim = q.shape
    num_slots, kv_heads, half = hidden.shape[1], k.shape[1], triton.next_power_of_2(head_dim) // 2
    num_splits = choose_num_splits(batch_size * heads, num_slots)
    out = torch.empty(batch_size, heads, head_dim, dtype=q.dtype, device=q.device)
    parts = out if num_splits == 1 else out.new_empty(batch_size, heads, num_splits, head_dim, dtype=torch.float32)
    lse = out.new_empty(batch_size, heads, num_splits, dtype=torch.float32)
    angles = lse if cos_sin is None else cos_sin.contiguous()
    _attend_slots[(batch_size * heads * num_splits,)](
        q, k, v, angles, x, hidden, key_value, slot, visible, parts, lse, scale, num_slots, num_splits, x.shape[1],
        q.stride(0), k.stride(0), v.stride(0), x.stride(0), angles.stride(0) if angles.shape[0] > 1 else 0,
        hidden.stride(0), key_value.stride(0), key_value.stride(1), HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        HALF=half, N=SLOTS_PER_STEP, IS_ROTATED=cos_sin is not None, num_warps=4,
    )  # fmt: skip
    if num_splits > 1:
        _merge_parts[(batch_size * heads,)](
            parts, lse, out, num_splits, HEAD_DIM=head_dim, D=2 * half,
            MAX_SPLITS=triton.next_power_of_2(num_splits), num_warps=2,
        )  # fmt: skip
    return out


@attend_ring.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
