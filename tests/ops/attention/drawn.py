"""Drawn attention problems: sections of keys as memories make them, with documents, prefixes and blind queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from memtx.ops.attention.bias import Bias
from memtx.ops.visibility import Section, Visibility

FAR = 1 << 40


@dataclass(frozen=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    visibility: Visibility
    bias: Bias | None
    block: int


@st.composite
def problems(draw: st.DrawFn, kv_groups: tuple[int, ...] = (1, 2, 4), most: int = 70) -> Problem:
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
        Section(prefix, -(prefix * stride // 2) if prefix else 0, stride, span),
        Section(cached + queries, -cached, 1, draw(st.sampled_from((window, None)))),
    )
    visibility = Visibility(
        torch.cat([prefix_born, tick], 1), torch.cat([prefix_expires, expires], 1), queries, sections
    )
    head_dim = draw(st.sampled_from((4, 8, 20)))
    q, k, v = (
        torch.randn(rows, h, n, head_dim, dtype=torch.float64, generator=generator)
        for h, n in ((heads, queries), (heads // group, visibility.keys), (heads // group, visibility.keys))
    )
    bias = None
    if draw(st.booleans()):
        slopes = 0.5 ** torch.arange(1.0, heads + 1, dtype=torch.float64)
        bias = Bias(slopes, visibility.born.clamp(max=queries).double())
    return Problem(q, k, v, visibility, bias, draw(st.sampled_from((1, 7, 16, 128))))
