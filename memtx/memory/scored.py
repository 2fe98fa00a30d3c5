"""A bank that keeps what scores highest instead of what is newest.

A bank of the newest entries is a cliff: what is older is gone at once. Here a learned score decides which entries stay,
and the same score is added to what attention makes of an entry (its log-weight), which is how it learns, though which
ones stay is a choice without a gradient. With ``rate=1`` and no compression to speak of it is a store of exact states;
beside a fast-weight memory (a list in ``memories``) the two are HOLA's pair (2026), a delta state and a small exact
bank, there with the fast weights' own error as the score.

An entry is seen from its birth until ``length`` entries that score higher have been born in its document, which is a
function of the entries alone: how a stream is cut does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention, Losses, Places, Trace, View
from memtx.memory.compressed import Blocks, Compressed, CompressedMemory, CompressedState
from memtx.memory.compression import Compression, StridedConvolution
from memtx.memory.edge import Edge
from memtx.memory.reconstruction import Reconstruction
from memtx.memory.recurrent import newest
from memtx.ops.linear import Linear
from memtx.ops.visibility import Section, Visibility
from memtx.segment import FAR, Segment
from memtx.state import state

STEP = 2.0**-10
"""Scores nearer than this are equal, and of equal ones the newer goes first."""


@state
class ScoredState(CompressedState):
    """Cache and bank, whose entries are kept in order of birth, newest last.

    Attributes:
        age: (rows, length) int64, tokens read since each entry was born, that token included; 0 for none.
    """

    age: Tensor


@dataclass(frozen=True)
class _Kept:
    compressed: Compressed
    plan: Blocks
    age: Tensor


class ScoredMemory(CompressedMemory):
    """An exact window and a bank of the entries that score highest.

    Args:
        dim: width of the hidden states.
        window: exact positions seen at least (up to window + rate - 1, as the edge moves by blocks).
        rate: positions an entry stands for; 1 for a bank of exact states.
        length: entries kept.
        compression: makes the compression from (dim, rate).
        reconstruction: makes an auxiliary loss from (dim, rate); None for none.

    Raises:
        MemtxError: a number is out of range.
    """

    padded = False
    lasting = True

    def __init__(
        self,
        dim: int,
        window: int = 512,
        rate: int = 4,
        length: int = 128,
        compression: Callable[[int, int], Compression] = StridedConvolution,
        reconstruction: Callable[[int, int], Reconstruction] | None = None,
    ) -> None:
        super().__init__(dim, window, rate, length, compression, reconstruction)
        # Begins as the bank of the newest: of equal scores the newer entry stays.
        self.score = Linear(dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def init_state(self, rows: int, *, like: Tensor) -> ScoredState:
        """Return an empty cache and an empty bank."""
        fresh = super().init_state(rows, like=like)
        age = torch.zeros(rows, self.length, dtype=torch.int64, device=like.device)
        return ScoredState(fresh.hidden, fresh.bank, age)

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | blocks crossing the edge | cache | segment]."""
        assert isinstance(state, ScoredState)
        edge = self._edge(segment)
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        made = self._compress(cache, x, edge, attention)
        weight: Tensor = self.score(torch.cat([bank, made.entries], dim=1))[..., 0]
        # Equal states must score equally whatever batch they stand in, so rounding may not tell them apart.
        plan, age = self._chosen(segment, edge, state.age, (weight.detach().double() / STEP).round())
        return View((bank, made.entries, cache, x), plan.places, _Kept(made, plan, age), weight)

    def _chosen(self, segment: Segment, edge: Edge, age: Tensor, score: Tensor) -> tuple[Blocks, Tensor]:
        """Return when each of [bank | blocks] is seen, and the ages of the next bank's.

        Args:
            segment: where the call's tokens stand.
            edge: what crosses in it.
            age: (rows, length) int64, of the bank.
            score: (rows, entries), of both.
        """
        count = score.shape[1]
        there = torch.cat([age > 0, edge.born], dim=1)
        document = torch.cat([torch.zeros_like(age), edge.document], dim=1)
        born = torch.cat([-age, edge.at], dim=1)
        end = torch.cat([segment.carried_end[:, None].expand_as(age), edge.end], dim=1)

        # (rows, of it, other): whether the other is of its document and goes before it; of equals the newer does.
        order = torch.arange(count, device=score.device)
        own, other = score[:, :, None], score[:, None]
        ahead = (other > own) | ((other == own) & (order > order[:, None]))
        ahead &= there[:, None] & (document[:, :, None] == document[:, None])
        # Entries are born in order: at the first birth, its own or a later one, by which `length` others are ahead
        # of an entry, it is gone for good.
        gone = (ahead.cumsum(2, dtype=torch.int32) >= self.length) & (order >= order[:, None])
        leaves = gone.any(2)
        left = torch.where(leaves, born.gather(1, gone.int().argmax(2)), FAR)
        expires = torch.where(there, torch.minimum(left, end), -FAR)
        exact = torch.minimum(edge.leaves, edge.exact_end)
        places = Places(
            torch.cat([self._centre(born), edge.tick], dim=1),
            Visibility(
                torch.cat([born, edge.tick], dim=1),
                torch.cat([expires, exact], dim=1),
                segment.length,
                (Section(count), Section(edge.tick.shape[1], -self.cached, 1, self.cached)),
            ),
        )
        stays = there & ~leaves & (document == segment.document[:, -1:])
        kept = stays.int().argsort(dim=1, stable=True)[:, count - self.length :]
        alive = stays.gather(1, kept)
        next_age = torch.where(alive, segment.length - born.gather(1, kept), 0)
        return Blocks(kept, alive[..., None], places), next_age

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[ScoredState, Losses]:
        """Keep the newest states and the highest entries of the newest document."""
        kept: _Kept = view.kept
        bank, entries, cache, x = view.parts
        losses = self._losses(kept.compressed, segment, trace)
        return ScoredState(newest(cache, x, segment), kept.plan.following(bank, entries), kept.age), losses

    def layout(self) -> None:
        """Return None: entries leave from anywhere, so a stream is decoded by calls of one token."""
        return None
