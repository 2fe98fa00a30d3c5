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
from memtx.ops.attention.blocks import scores_of
from memtx.ops.attention.reference import weigh
from memtx.ops.visibility import Pattern, Visibility


def distinct(index: Tensor) -> Tensor:
    """Return the index (..., n) with -1 in place of what stood before it already."""
    repeated = (index[..., :, None] == index[..., None, :]).tril(-1).any(-1)
    return index.masked_fill(repeated, -1)


@dataclass(frozen=True)
class Blocks:
    """The blocks of keys that a pattern's blocks of queries see.

    Attributes:
        table: (1 or heads, query blocks, r) int64, which; in range whether or not one is seen.
        entries: blocks of keys there are.
        seen: (rows or 1, 1 or heads, query blocks, 1 or size, r * size) bool, who sees whom.
    """

    table: Tensor
    entries: int
    seen: Tensor


def in_lives(x: Tensor, pattern: Pattern, table: Tensor, entries: int) -> Tensor:
    """Gather (rows, keys) to (rows, 1 or heads, query blocks, 1, r * size); padded keys get 0."""
    size, first = pattern.size, pattern.first
    x = F.pad(x[:, first:], (0, entries * size - x.shape[1] + first)).view(x.shape[0], entries, size)
    return x[:, table].flatten(3, 4)[..., None, :]


def blocks_of(visibility: Visibility) -> Blocks:
    """Find a pattern's blocks.

    Unless they are to count as often as they are seen, a block mentioned twice counts once, and keys that a lifetime
    shows to the query are left out.
    """
    pattern = visibility.pattern
    assert pattern is not None
    assert pattern.blocks is not None
    size = pattern.size
    entries = max(-(-(visibility.keys - pattern.first) // size), 1)
    asked = pattern.blocks if pattern.repeats else distinct(pattern.blocks)
    table = asked.clamp(0, entries - 1)

    def of_lives(x: Tensor) -> Tensor:
        return in_lives(x, pattern, table, entries)

    # Padded keys get 0 for both ends of every life, so they are in no document.
    begins, ends = pattern.begins, pattern.ends
    tick = torch.arange(table.shape[1] * size, device=table.device).view(-1, size, 1)
    open_all = (begins <= 0) & (ends >= visibility.queries)
    # On a GPU, or while a graph is compiled, numbers are not looked at for the sake of a smaller mask.
    looked = table.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked and pattern.repeats and bool((open_all | (ends <= begins)).all()):
        seen = of_lives(open_all.to(torch.int64)) > 0
    else:
        seen = (of_lives(begins) <= tick) & (tick < of_lives(ends))
    if not pattern.repeats:
        seen = seen & ~((of_lives(visibility.born) <= tick) & (tick < of_lives(visibility.expires)))
    chosen = (asked >= 0) & (asked < entries)
    return Blocks(table, entries, seen & chosen.repeat_interleave(size, dim=-1)[..., None, :])


def random_blocks(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, bias: ScoreBias | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the keys of the pattern's blocks."""
    pattern = visibility.pattern
    assert pattern is not None
    blocks = blocks_of(visibility)
    heads, queries = q.shape[1:3]
    size, first, table, keys = pattern.size, pattern.first, blocks.table, blocks.entries

    def in_blocks(x: Tensor, entries: int) -> Tensor:
        """(..., n, width) -> (..., blocks, size, width)."""
        return F.pad(x, (0, 0, 0, entries * size - x.shape[-2])).reshape(*x.shape[:-2], entries, size, x.shape[-1])

    def of_keys(x: Tensor) -> Tensor:
        """(rows, h, keys, width) -> (rows, heads, query blocks, r * size, width)."""
        head = torch.arange(heads, device=x.device) * x.shape[1] // heads
        return in_blocks(x[:, :, first:], keys)[:, head[:, None, None], table].flatten(3, 4)

    scores = scores_of(in_blocks(q, table.shape[1]), of_keys(k), scale)
    if bias is not None:
        tick = torch.arange(table.shape[1] * size, device=q.device).view(-1, size, 1)
        scores = scores + bias.score(tick - in_lives(bias.tick, pattern, table, keys)).to(scores.dtype)
    out, lse = weigh(scores, blocks.seen, of_keys(v), dropout)
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
