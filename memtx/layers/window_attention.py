"""Longformer's attention: each token sees a window of its neighbours, global tokens see all and are seen by all.

Beltagy, Peters and Cohan 2020, section 3.1. Global tokens ask with projections of their own, of the asking and of
what they see; tokens that are not global see them as they see any other. A dilated window keeps every d-th
neighbour, so the tokens fall into d texts that do not see each other, and each is a text with a plain window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.layers.pattern_attention import PatternAttention, seen_by_all, side_by_side
from memtx.layers.reading import Reading
from memtx.ops.attention.dispatch import Backend, segment_attention
from memtx.ops.linear import Linear
from memtx.ops.visibility import Pattern, Section, Visibility
from memtx.segment import FAR


class WindowAttention(PatternAttention):
    """Windows and global tokens.

    Args:
        dim: width of the hidden states.
        heads: how many.
        layer: the layer's number, from 0.
        window: neighbours seen, half of them before the token and half after it, besides the token itself; even.
        dilation: distance from one neighbour to the next.
        links: random tokens that each head of each token sees as well (Big Bird's article, Zaheer et al. 2020,
            section 2); they depend on ``seed``, the layer and the text's length alone.
        seed: of the random links.
        bias: whether queries, keys and values have biases.
        dropout: of attention weights.
        backend: of the attention operation.

    Raises:
        MemtxError: the window is not even and positive, another number is out of range, or random links are asked
            for beside a dilated window.
    """

    knows_globals = True

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int = 0,
        window: int = 512,
        dilation: int = 1,
        links: int = 0,
        seed: int = 0,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(dim, heads, layer, bias=bias, dropout=dropout, backend=backend)
        if window < 2 or window % 2:
            raise MemtxError(f"window is {window}, expected an even number from 2 on.", "Half of it is on each side.")
        if dilation < 1 or links < 0:
            raise MemtxError(f"dilation is {dilation}, links is {links}.", "Give at least 1 and at least 0.")
        if links and dilation > 1:
            raise MemtxError("Random links are not drawn beside a dilated window.", "Choose one of the two.")
        self.window = window
        self.dilation = dilation
        self.links = links
        self.seed = seed
        self.global_query = Linear(dim, dim, bias=bias)
        self.global_key = Linear(dim, dim, bias=bias)
        self.global_value = Linear(dim, dim, bias=bias)

    def attend(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the heads' results side by side, (rows, length, dim), zero at padding, of x (rows, length, dim)."""
        q, k, v = (self.in_heads(part(x)) for part in (self.query, self.key, self.value))
        q, k, v = self._folded(q), self._keys(k, reading), self._keys(v, reading)
        settings = ("window", self.window, self.dilation, (self.heads, self.layer, self.seed) if self.links else None)
        visibility = reading.once(settings, lambda: self._visibility(reading))
        out = segment_attention(q, k, v, visibility, dropout=self.dropout, backend=self.backend)
        out = side_by_side(self._unfolded(out)[:, :, : reading.length])
        if reading.present is not None:
            out = out.masked_fill(~reading.present[..., None], 0.0)
        return out if reading.asked is None else self._with_globals(out, x, reading, reading.asked)

    def near(self, distance: Tensor) -> Tensor | None:
        """Return whether a window holds both; None where random links are seen as well."""
        if self.links:
            return None
        return (distance.abs() <= self.window // 2 * self.dilation) & (distance % self.dilation == 0)

    def _with_globals(self, out: Tensor, x: Tensor, reading: Reading, asked: Tensor) -> Tensor:
        """Return out with what global tokens see in their places."""
        there = asked >= 0
        rows = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(asked)
        q = self.in_heads(self.global_query(x[rows, asked.clamp(min=0)]))
        k, v = (self.in_heads(part(x)) for part in (self.global_key, self.global_value))
        seen = seen_by_all(reading, asked.shape[1])
        seeing = side_by_side(segment_attention(q, k, v, seen, dropout=self.dropout, backend=self.backend))
        return out.index_put((rows[there], asked[there]), seeing[there])

    def _keys(self, x: Tensor, reading: Reading) -> Tensor:
        """Return the keys of each dilated text, those of the global tokens first."""
        folded = self._folded(x)
        if reading.asked is None:
            return folded
        index = reading.asked.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return torch.cat([x.gather(2, index).repeat_interleave(self.dilation, dim=0), folded], dim=2)

    def _folded(self, x: Tensor) -> Tensor:
        """(rows, heads, n, width) -> (rows * dilation, heads, n / dilation rounded up, width)."""
        if self.dilation == 1:
            return x
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.dilation))
        x = x.view(*x.shape[:2], -1, self.dilation, x.shape[3])  # (rows, heads, places, dilation, width)
        return x.permute(0, 3, 1, 2, 4).flatten(0, 1)

    def _unfolded(self, x: Tensor) -> Tensor:
        if self.dilation == 1:
            return x
        x = x.view(-1, self.dilation, *x.shape[1:])  # (rows, dilation, heads, places, width)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def _visibility(self, reading: Reading) -> Visibility:
        """Return who sees whom among [global tokens | the text], of each dilated text."""
        length = reading.length
        rows = 1 if reading.present is None and reading.asked is None else None
        windowed = torch.ones(1, length, dtype=torch.bool, device=reading.device)
        if reading.present is not None:
            windowed = reading.present
        if reading.asked is not None:
            # A global token stands before the text's keys, and is to be seen once.
            rows = reading.asked.shape[0]
            windowed = nn.functional.pad(windowed.expand(rows, -1), (0, 1))
            place = torch.where(reading.asked < 0, length, reading.asked)
            windowed = windowed.scatter(1, place, False)[:, :length]
        windowed = self._folded(windowed[:, None, :, None])[:, 0, :, 0]
        tick = torch.arange(windowed.shape[1], device=reading.device).expand_as(windowed)
        half = self.window // 2
        born, expires = tick - half, torch.where(windowed, tick + half + 1, -FAR)
        section = Section(windowed.shape[1], -half, 1, 2 * half + 1)
        if reading.asked is None:
            return Visibility(born, expires, windowed.shape[1], (section,), self._linked(reading, windowed, 0))
        there = (reading.asked >= 0).repeat_interleave(self.dilation, dim=0)
        ends = torch.where(there, windowed.shape[1], 0)
        born = torch.cat([torch.zeros_like(ends), born], dim=1)
        expires = torch.cat([ends, expires], dim=1)
        sections = (Section(ends.shape[1]), section)
        return Visibility(born, expires, windowed.shape[1], sections, self._linked(reading, windowed, ends.shape[1]))

    def _linked(self, reading: Reading, windowed: Tensor, first: int) -> Pattern | None:
        """Return the random links as blocks of one key; global tokens and padding are none of them."""
        if not self.links:
            return None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.layer)
        blocks = torch.randint(reading.length, (self.heads, reading.length, self.links), generator=generator)
        ends = torch.where(windowed, reading.length, 0)
        ends = torch.cat([ends.new_zeros(ends.shape[0], first), ends], dim=1)
        return Pattern(torch.zeros_like(ends), ends, blocks=blocks.to(reading.device), size=1, first=first)
