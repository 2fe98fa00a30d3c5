"""Drawn attention problems: sections of keys as memories make them, with documents, prefixes and blind queries."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention.bias import AlibiBias, RelativeBias, ScoreBias
from memtx.ops.attention.mask import KeyRange, SparsePattern, Visibility

FAR = 1 << 40


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    bias: ScoreBias | None
    block: int


def pattern(draw: st.DrawFn, seen: Visibility, rows: int, heads: int, generator: torch.Generator) -> SparsePattern:
    """Documents of their own, global queries and random blocks, with repeats and places that stand for none."""
    size, first = draw(st.integers(1, 9)), draw(st.integers(0, seen.num_keys))

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    begins = integers(-5, seen.num_queries, draw(st.sampled_from((1, rows))), seen.num_keys)
    ends = begins + integers(0, seen.num_queries + 5, *begins.shape)
    if draw(st.booleans()):  # nothing but whole texts and padding
        ends = torch.where(ends - begins > 3, begins.new_full((), seen.num_queries), 0)
        begins = torch.zeros_like(ends)
    asked = integers(-2, seen.num_queries, draw(st.sampled_from((1, rows))), draw(st.integers(1, 4)))
    table = integers(-1, seen.num_keys // size + 2, draw(st.sampled_from((1, heads))), -(-seen.num_queries // size), 3)
    which = draw(st.sampled_from(("queries", "blocks", "both")))
    return SparsePattern(
        begins,
        ends,
        asked if which != "blocks" else None,
        table if which != "queries" else None,
        size,
        first,
        draw(st.booleans()),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    kv_groups: tuple[int, ...] = (1, 2, 4),
    most: int = 70,
    biases: tuple[str, ...] = ("none", "linear", "relative", "buckets"),
    patterns: bool = False,
    widths: tuple[int, ...] = (4, 8, 20),
) -> Problem:
    """A prefix whose keys advance by a stride, then a window; some keys never seen, some queries seeing nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, queries, cached = draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.integers(0, most))
    window, stride, prefix = draw(st.integers(1, 90)), draw(st.integers(1, 5)), draw(st.integers(0, 40))
    heads, group = 4, draw(st.sampled_from(kv_groups))
    shared = draw(st.booleans())

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    lives = 1 if shared else rows
    steady = torch.arange(prefix) * stride - prefix * stride // 2
    prefix_born = steady + integers(0, stride, lives, prefix)
    span = draw(st.integers(0, 60))
    prefix_expires = prefix_born + integers(0, span + 1, lives, prefix)
    tick = torch.arange(-cached, queries).expand(lives, -1)
    end = torch.where(torch.rand(tick.shape, generator=generator) < 0.1, tick, FAR)  # documents begin anywhere
    end = torch.cat([end[:, 1:], torch.full((lives, 1), FAR)], 1).flip(1).cummin(1).values.flip(1)
    expires = torch.minimum(tick + window, end)
    expires = torch.where(
        torch.rand(tick.shape, generator=generator) < draw(st.sampled_from((0.0, 0.5))), -FAR, expires
    )
    if draw(st.integers(0, 5)) == 0:  # nobody sees anything
        prefix_expires, expires = torch.full_like(prefix_expires, -FAR), torch.full_like(expires, -FAR)
    sections = (
        KeyRange(prefix, -(prefix * stride // 2) if prefix else 0, stride, span),
        KeyRange(cached + queries, -cached, 1, draw(st.sampled_from((window, None)))),
    )
    # A bidirectional window sees as far ahead as back.
    ahead = draw(st.sampled_from((0, window)))
    if ahead:
        sections = (sections[0], KeyRange(cached + queries, -cached - ahead, 1, window + ahead))
    born = torch.cat([prefix_born, tick - ahead], 1)
    visibility = Visibility(born, torch.cat([prefix_expires, expires], 1), queries, sections)
    if patterns:
        visibility = replace(visibility, pattern=pattern(draw, visibility, rows, heads, generator), _values={})
    head_dim = draw(st.sampled_from(widths))
    q, k, v = (
        torch.randn(rows, h, n, head_dim, dtype=torch.float64, generator=generator)
        for h, n in ((heads, queries), (heads // group, visibility.num_keys), (heads // group, visibility.num_keys))
    )
    places = visibility.visible_from.clamp(-FAR, queries).double()
    bias: ScoreBias | None = None
    kind = draw(st.sampled_from(biases))
    if kind == "linear":
        bias = AlibiBias(0.5 ** torch.arange(1.0, heads + 1, dtype=torch.float64), places)
    elif kind != "none":
        # Half a tick, as for a block's centre; some distances are beyond both ends of the table.
        places = places + 0.5 * integers(0, 2, *places.shape)
        table = torch.randn(heads, 7, dtype=torch.float64, generator=generator)
        buckets = torch.arange(20).pow(0.5).long() if kind == "buckets" else None
        bias = RelativeBias(table, places, draw(st.integers(-9, 3)), buckets)
    return Problem(q, k, v, visibility, bias, draw(st.sampled_from((1, 7, 16, 128))))
