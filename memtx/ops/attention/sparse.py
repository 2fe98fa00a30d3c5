"""What lifetimes cannot say, beside the bands: random blocks, joined by log-sum-exp, and global queries, put on top.

Both gather what they need, so their cost is that of what is seen: (queries x r blocks of keys), and
(global queries x all keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias
from memtx.ops.attention.blocks import compute_scores
from memtx.ops.attention.mask import SparsePattern, Visibility
from memtx.ops.attention.reference import softmax_attention


def mask_duplicates(indices: Tensor) -> Tensor:
    """Return the index (..., n) with -1 in place of what stood before it already."""
    repeated = (indices[..., :, None] == indices[..., None, :]).tril(-1).any(-1)
    return indices.masked_fill(repeated, -1)


@dataclass(frozen=True)
class KeyBlocks:
    """The blocks of keys that a pattern's blocks of queries see.

    Attributes:
        table: (1 or heads, query blocks, r) int64, which; in range whether or not one is seen.
        num_key_blocks: blocks of keys there are.
        mask: (rows or 1, 1 or heads, query blocks, 1 or size, r * size) bool, who sees whom.
    """

    table: Tensor
    num_key_blocks: int
    mask: Tensor


def gather_per_key(x: Tensor, pattern: SparsePattern, table: Tensor, num_key_blocks: int) -> Tensor:
    """Gather (rows, keys) to (rows, 1 or heads, query blocks, 1, r * size); padded keys get 0."""
    size, first = pattern.block_size, pattern.first_key
    x = F.pad(x[:, first:], (0, num_key_blocks * size - x.shape[1] + first)).view(x.shape[0], num_key_blocks, size)
    return x[:, table].flatten(3, 4)[..., None, :]


def find_key_blocks(visibility: Visibility) -> KeyBlocks:
    """Find a pattern's blocks.

    Unless they are to count as often as they are seen, a block mentioned twice counts once, and keys that a lifetime
    shows to the query are left out.
    """
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.random_blocks is not None
    size = pattern.block_size
    entries = max(-(-(visibility.num_keys - pattern.first_key) // size), 1)
    asked = pattern.random_blocks if pattern.count_duplicates else mask_duplicates(pattern.random_blocks)
    table = asked.clamp(0, entries - 1)

    def of_lives(x: Tensor) -> Tensor:
        return gather_per_key(x, pattern, table, entries)

    # Padded keys get 0 for both ends of every life, so they are in no document.
    begins, ends = pattern.document_start, pattern.document_end
    tick = torch.arange(table.shape[1] * size, device=table.device).view(-1, size, 1)
    open_all = (begins <= 0) & (ends >= visibility.num_queries)
    # On a GPU, or while a graph is compiled, numbers are not looked at for the sake of a smaller mask.
    looked = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked and pattern.count_duplicates and bool((open_all | (ends <= begins)).all()):
        seen = of_lives(open_all.to(torch.int64)) > 0
    else:
        seen = (of_lives(begins) <= tick) & (tick < of_lives(ends))
    if not pattern.count_duplicates:
        seen = seen & ~((of_lives(visibility.visible_from) <= tick) & (tick < of_lives(visibility.visible_until)))
    chosen = (asked >= 0) & (asked < entries)
    return KeyBlocks(table, entries, seen & chosen.repeat_interleave(size, dim=-1)[..., None, :])


def attend_random_blocks(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the keys of the pattern's blocks."""
    pattern = visibility.pattern
    assert pattern is not None
    blocks = find_key_blocks(visibility)
    heads, queries = q.shape[1:3]
    size, first, table, keys = pattern.block_size, pattern.first_key, blocks.table, blocks.num_key_blocks

    def in_blocks(x: Tensor, entries: int) -> Tensor:
        """(..., n, width) -> (..., blocks, size, width)."""
        return F.pad(x, (0, 0, 0, entries * size - x.shape[-2])).reshape(*x.shape[:-2], entries, size, x.shape[-1])

    def of_keys(x: Tensor) -> Tensor:
        """(rows, h, keys, width) -> (rows, heads, query blocks, r * size, width)."""
        head = torch.arange(heads, device=x.device) * x.shape[1] // heads
        return in_blocks(x[:, :, first:], keys)[:, head[:, None, None], table].flatten(3, 4)

    scores = compute_scores(in_blocks(q, table.shape[1]), of_keys(k), scale)
    if bias is not None:
        tick = torch.arange(table.shape[1] * size, device=q.device).view(-1, size, 1)
        scores = scores + bias.compute_bias(tick - gather_per_key(bias.key_offset, pattern, table, keys)).to(
            scores.dtype
        )
    out, lse = softmax_attention(scores, blocks.mask, of_keys(v), dropout)
    return out.flatten(2, 3)[:, :, :queries], lse.flatten(2, 3)[:, :, :queries]


def attend_global_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    dropout: float,
    local_attention: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the output and log-sum-exp of ``local_attention`` with those of the global queries in their places."""
    pattern: SparsePattern | None = visibility.pattern
    assert pattern is not None
    assert pattern.global_queries is not None
    tick = mask_duplicates(pattern.global_queries).expand(q.shape[0], -1)  # (rows, n)
    index = tick.clamp(min=0)[:, None, :, None]
    seen = (pattern.document_start[:, None] <= tick[..., None]) & (tick[..., None] < pattern.document_end[:, None])
    seen = seen | (
        (visibility.visible_from[:, None] <= tick[..., None]) & (tick[..., None] < visibility.visible_until[:, None])
    )
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = compute_scores(q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3])), k, scale)
    if bias is not None:
        scores = scores + bias.compute_bias((tick[..., None] - bias.key_offset[:, None])[:, None]).to(scores.dtype)
    out, lse = softmax_attention(scores, seen[:, None], v, dropout)
    # A place that holds no query is written behind the last one, and cut off.
    index = torch.where(tick < 0, q.shape[2], tick)[:, None]

    def put(x: Tensor, new: Tensor) -> Tensor:
        """Put new (rows, heads, n, width) into x (rows, heads, queries, width)."""
        return F.pad(x, (0, 0, 0, 1)).scatter(2, index[..., None].expand_as(new), new)[:, :, :-1]

    return put(local_attention[0], out.to(local_attention[0].dtype)), put(
        local_attention[1][..., None], lse[..., None]
    )[..., 0]
