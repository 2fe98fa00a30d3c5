"""Attention by torch's flex_attention, with the intervals as a mask function; masked blocks are skipped.

Meant for CUDA, where it compiles to one kernel per bucket of lengths, to which queries and keys are padded; on the CPU
it runs uncompiled, for comparison. The block mask depends only on the static key ranges and is cached by shape. The
mask function reads the intervals as tensors, so nothing is rebuilt or recompiled as the memory fills.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import AlibiBias
from memtx.ops.attention.mask import KeyRange, Visibility, find_key_bounds, is_inside

BLOCK_SIZE = 128
"""Number of queries, and of keys, per block: the default of flex_attention."""


RECOMPILE_LIMIT = 64
"""Maximum number of compiled kernels; torch's limit of 8, beyond which it computes all scores, is for whole models."""


def round_up(length: int) -> int:
    """Return the bucket of a length: a multiple of the block size, of which there are at most eight per octave."""
    step = max(BLOCK_SIZE, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step


@cache
def _load_flex_attention(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    if not compiled:
        return function
    kernel = torch.compile(function, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return kernel(*args, **kwargs)

    return run


@lru_cache(maxsize=64)
def create_static_block_mask(key_ranges: tuple[KeyRange, ...], num_queries: int, device: torch.device) -> Any:
    """Return a BlockMask of all blocks of the padded shape that the ranges do not exclude, without a mask function."""
    from torch.nn.attention.flex_attention import BlockMask

    shape = (round_up(num_queries), round_up(sum(key_range.num_keys for key_range in key_ranges)))
    # In Python: a model that is compiled as a whole cannot read a tensor.
    needed_blocks = [[False] * (shape[1] // BLOCK_SIZE) for _ in range(shape[0] // BLOCK_SIZE)]
    for start in range(0, num_queries, BLOCK_SIZE):
        for low, high in find_key_bounds(key_ranges, start, min(start + BLOCK_SIZE, num_queries)):
            for block in range(low // BLOCK_SIZE, -(-high // BLOCK_SIZE) if high > low else 0):
                needed_blocks[start // BLOCK_SIZE][block] = True
    needed = torch.tensor(needed_blocks, device="cpu")
    # The needed blocks come first, in order.
    index = torch.argsort(~needed, dim=1, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        needed.sum(1, dtype=torch.int32)[None, None].to(device),
        index[None, None].to(device),
        BLOCK_SIZE=BLOCK_SIZE,
        seq_lengths=shape,
    )


def _create_block_mask(visibility: Visibility, batch_size: int) -> Any:
    padding = (0, round_up(visibility.num_keys) - visibility.num_keys)
    # Padded keys have an empty interval.
    bounds = (F.pad(bound, padding) for bound in (visibility.visible_from, visibility.visible_until))
    start, end = (bound.expand(batch_size, -1) for bound in bounds)

    def mask_mod(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_inside(query, start[batch, key], end[batch, key])

    mask = copy.copy(create_static_block_mask(visibility.key_ranges, visibility.num_queries, start.device))
    mask.mask_mod = mask_mod
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, bias: AlibiBias | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its log-sum-exp, on CUDA with gradient.

    Arguments are those of :func:`memtx.ops.attention.dispatch.segment_attention`, without a pattern.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    assert visibility.pattern is None, "dispatch sends patterns to 'banded'"
    mask = visibility.memo(("flex", q.shape[0]), lambda: _create_block_mask(visibility, q.shape[0]))
    queries, num_padded_keys = q.shape[2], round_up(k.shape[2]) - k.shape[2]
    q, k, v = F.pad(q, (0, 0, 0, round_up(queries) - queries)), *(F.pad(x, (0, 0, 0, num_padded_keys)) for x in (k, v))
    score_mod = None
    if bias is not None:
        slopes, key_offset = bias.slopes.to(q.dtype), F.pad(bias.key_offset.to(torch.float32), (0, num_padded_keys))
        key_offset = key_offset.expand(q.shape[0], -1)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes[head] * (query - key_offset[batch, key])

    out, aux = _load_flex_attention(q.is_cuda)(
        q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out[:, :, :queries], aux.lse[:, :, :queries]
