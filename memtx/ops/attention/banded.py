"""Banded attention: each block of queries attends only to the keys it may see, through views.

The keys of a block form one or two ranges (compressed prefix, exact window). On the CPU each range is one fused call on
slices of q, k and v, without copies, and ranges are merged by log-sum-exp. Cost and memory are linear in the number
of queries.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention import sparse
from memtx.ops.attention.bias import ScoreBias, compute_block_bias, is_unfused
from memtx.ops.attention.mask import Visibility, create_mask, find_key_ranges
from memtx.ops.attention.reference import merge_attention, repeat_kv, softmax_attention
from memtx.ops.attention.scores import compute_scores
from memtx.ops.cpu import sdpa_cpu

BLOCK_SIZE = 128
"""Queries per block: fastest for forward and backward at window 512 on the CPU."""

MAX_GAP = 160
"""Maximum number of keys between two ranges that share a call; a second call costs about as much."""


def split_queries(visibility: Visibility, block_size: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return the bounds of each block of queries and the ranges of keys it may see."""
    blocks = []
    for start in range(0, visibility.num_queries, block_size):
        stop = min(start + block_size, visibility.num_queries)
        merged: list[tuple[int, int]] = []
        for low, high in find_key_ranges(visibility, start, stop):
            if merged and low - merged[-1][1] <= MAX_GAP:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        blocks.append((start, stop, merged))
    return blocks


def gather_ranges(x: Tensor, key_ranges: list[tuple[int, int]]) -> Tensor:
    """Return the keys of the ranges in one tensor: a view of x ``(batch, kv_heads, keys, head_dim)`` if one range."""
    parts = [x[:, :, low:high] for low, high in key_ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def create_additive_mask(
    visibility: Visibility, bias: ScoreBias | None, query_range: tuple[int, int], key_range: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a block's mask and fully masked queries, with the shapes of :class:`memtx.ops.cpu.sdpa_cpu.Band`."""
    visible = create_mask(visibility, query_range, key_range)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))[:, None]
    if bias is not None:
        mask = mask + compute_block_bias(bias, query_range, key_range).to(dtype)
    return mask, ~visible.any(-1)[:, :, None]


def build_bands(
    visibility: Visibility, bias: ScoreBias | None, block_size: int, dtype: torch.dtype
) -> list[sdpa_cpu.Band]:
    """Return the fused calls of a segment."""
    bands = []
    for start, stop, key_ranges in split_queries(visibility, block_size):
        for bounds in key_ranges:
            mask, fully_masked = create_additive_mask(visibility, bias, (start, stop), bounds, dtype)
            bands.append(sdpa_cpu.Band(slice(start, stop), slice(*bounds), mask, fully_masked, bias is not None))
    return bands


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility,
    *, bias: ScoreBias | None = None, dropout: float = 0.0, scale: float, block_size: int = BLOCK_SIZE,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute attention and its log-sum-exp, both with gradient.

    Arguments are those of :func:`memtx.ops.attention.dispatch.segment_attention`, and ``block_size``, the number of
    queries per block. Without ``return_lse`` the log-sum-exp may be None.
    """
    pattern = visibility.pattern
    has_random = pattern is not None and pattern.random_blocks is not None
    has_global = pattern is not None and pattern.global_queries is not None
    on_cpu = q.device.type == "cpu"
    unfused = is_unfused(bias) or dropout > 0.0 or torch.compiler.is_exporting()
    # The CPU kernel computes random blocks with the bands; otherwise they are merged by log-sum-exp.
    gather = has_random and bias is None and not unfused and on_cpu
    out: Tensor
    lse: Tensor | None = None
    if on_cpu and not unfused:
        dtype = torch.promote_types(q.dtype, torch.float32)
        key = ("bands", block_size, dtype, bias)
        bands = visibility.memo(key, lambda: build_bands(visibility, bias, block_size, dtype))
        gathered = sdpa_cpu.get_gathered_blocks(q, k, visibility, dtype) if gather else None
        out, lse = sdpa_cpu.attend(q, k, v, bands, scale, gathered)
    elif unfused or return_lse or has_random or has_global:
        out, lse = attend_unfused(q, k, v, visibility, bias, scale, block_size, dropout)
    else:
        out = attend_sdpa(q, k, v, visibility, bias, scale, block_size)
    if has_random and not gather:
        assert lse is not None
        out, lse = merge_attention([(out, lse), sparse.attend_random_blocks(q, k, v, visibility, bias, scale, dropout)])
    if has_global:
        assert lse is not None
        out, lse = sparse.attend_global_queries(q, k, v, visibility, bias, scale, dropout, (out, lse))
    return out, lse


def merge_masks(
    visibility: Visibility, bias: ScoreBias | None, query_range: tuple[int, int], key_ranges: list[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return a block's additive mask over its ranges, 0 for fully masked queries, since kernels differ on them.

    Also return the queries to zero, ``(batch or 1, 1, queries, 1)`` bool.
    """
    blocks = [create_additive_mask(visibility, bias, query_range, bounds, dtype) for bounds in key_ranges]
    mask = torch.cat([mask for mask, _ in blocks], dim=-1)
    fully_masked = torch.stack([masked for _, masked in blocks]).all(0).transpose(1, 2)[..., None]
    return mask.masked_fill(fully_masked, 0.0), fully_masked


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, block_size: int
) -> Tensor:
    """Compute attention by one ``scaled_dot_product_attention`` per block, without log-sum-exp or bias gradient."""
    outputs = []
    for start, stop, key_ranges in split_queries(visibility, block_size):
        if not key_ranges:
            outputs.append(torch.zeros_like(q[:, :, start:stop]))
            continue
        build = partial(merge_masks, visibility, bias, (start, stop), key_ranges, q.dtype)
        mask, fully_masked = visibility.memo(("sdpa mask", start, stop, q.dtype, bias), build)
        keys, values = (gather_ranges(x, key_ranges) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q[:, :, start:stop], keys, values, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.masked_fill(fully_masked, 0.0))
    return torch.cat(outputs, dim=2)


def attend_unfused(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, block_size: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute attention and log-sum-exp block by block, with dropout and gradients of q, k, v and the bias.

    The weights of all blocks are stored for the backward pass: linear in the number of queries.
    """
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    blocks = []
    for start, stop, key_ranges in split_queries(visibility, block_size):
        # A block without keys gets zeros from an empty product.
        key_ranges = key_ranges or [(0, 0)]
        keys, values = (gather_ranges(x, key_ranges) for x in (k, v))
        scores = compute_scores(q[:, :, start:stop], keys, scale)
        if bias is not None:
            block_bias = [compute_block_bias(bias, (start, stop), bounds) for bounds in key_ranges]
            scores = scores + torch.cat(block_bias, dim=-1).to(scores.dtype)
        mask = torch.cat([create_mask(visibility, (start, stop), bounds) for bounds in key_ranges], dim=-1)
        blocks.append(softmax_attention(scores, mask[:, None], values, dropout))
    return torch.cat([out for out, _ in blocks], dim=2), torch.cat([lse for _, lse in blocks], dim=2)
