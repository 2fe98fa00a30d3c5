"""What lifetimes cannot say, beside the bands: random blocks, joined by log-sum-exp, and global queries, put on top.

Both gather what they need, so their cost is that of what is seen: (queries x r blocks of keys), and
(global queries x all keys).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memtx.ops.attention.bias import ScoreBias
from memtx.ops.attention.blocks import scores_of
from memtx.ops.attention.reference import weigh
from memtx.ops.visibility import Pattern, Visibility


def distinct(index: Tensor) -> Tensor:
    """Return the index (..., n) with -1 in place of what stood before it already."""
    repeated = (index[..., :, None] == index[..., None, :]).tril(-1).any(-1)
    return index.masked_fill(repeated, -1)


def random_blocks(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the keys of the pattern's blocks.

    Unless they are to count as often as they are seen, a block mentioned twice counts once, and keys that a lifetime
    shows to the query are left out.
    """
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.blocks is not None
    heads, queries = q.shape[1:3]
    size, first = pattern.size, pattern.first
    keys = max(-(-(visibility.keys - first) // size), 1)  # blocks of them
    table = pattern.blocks if pattern.repeats else distinct(pattern.blocks)  # (1 or heads, query blocks, r)
    chosen = (table >= 0) & (table < keys)
    table = table.clamp(0, keys - 1)

    def in_blocks(x: Tensor, entries: int) -> Tensor:
        """(..., n, width) -> (..., blocks, size, width)."""
        return F.pad(x, (0, 0, 0, entries * size - x.shape[-2])).reshape(*x.shape[:-2], entries, size, x.shape[-1])

    def of_keys(x: Tensor) -> Tensor:
        """(rows, h, keys, width) -> (rows, heads, query blocks, r * size, width)."""
        head = torch.arange(heads, device=x.device) * x.shape[1] // heads
        return in_blocks(x[:, :, first:], keys)[:, head[:, None, None], table].flatten(3, 4)

    def of_lives(x: Tensor) -> Tensor:
        """(rows, keys) -> (rows, 1 or heads, query blocks, 1, r * size)."""
        return in_blocks(x[:, first:, None], keys)[..., 0][:, table].flatten(3, 4)[..., None, :]

    # Padded keys get 0 for both ends of every life, so they are in no document.
    tick = torch.arange(table.shape[1] * size, device=q.device).view(-1, size, 1)
    document = (of_lives(pattern.begins) <= tick) & (tick < of_lives(pattern.ends))
    seen = document & chosen.repeat_interleave(size, dim=-1)[..., None, :]
    if not pattern.repeats:
        seen = seen & ~((of_lives(visibility.born) <= tick) & (tick < of_lives(visibility.expires)))
    scores = scores_of(in_blocks(q, table.shape[1]), of_keys(k), scale)
    if bias is not None:
        scores = scores + bias.score(tick - of_lives(bias.tick)).to(scores.dtype)
    out, lse = weigh(scores, seen, of_keys(v), dropout)
    return out.flatten(2, 3)[:, :, :queries], lse.flatten(2, 3)[:, :, :queries]


def global_queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visibility: Visibility,
    bias: ScoreBias | None,
    scale: float,
    dropout: float,
    others: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the output and log-sum-exp of ``others`` with those of the global queries in their places."""
    pattern: Pattern | None = visibility.pattern
    assert pattern is not None
    assert pattern.queries is not None
    tick = distinct(pattern.queries).expand(q.shape[0], -1)  # (rows, n)
    index = tick.clamp(min=0)[:, None, :, None]
    seen = (pattern.begins[:, None] <= tick[..., None]) & (tick[..., None] < pattern.ends[:, None])
    seen = seen | ((visibility.born[:, None] <= tick[..., None]) & (tick[..., None] < visibility.expires[:, None]))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = scores_of(q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3])), k, scale)
    if bias is not None:
        scores = scores + bias.score((tick[..., None] - bias.tick[:, None])[:, None]).to(scores.dtype)
    out, lse = weigh(scores, seen[:, None], v, dropout)
    # A place that holds no query is written behind the last one, and cut off.
    index = torch.where(tick < 0, q.shape[2], tick)[:, None]

    def put(x: Tensor, new: Tensor) -> Tensor:
        """Put new (rows, heads, n, width) into x (rows, heads, queries, width)."""
        return F.pad(x, (0, 0, 0, 1)).scatter(2, index[..., None].expand_as(new), new)[:, :, :-1]

    return put(others[0], out.to(others[0].dtype)), put(others[1][..., None], lse[..., None])[..., 0]
