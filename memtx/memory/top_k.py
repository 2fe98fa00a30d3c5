"""A bank that keeps what scores highest instead of what is newest.

A bank of the newest entries is a cliff: what is older is gone at once. Here a learned score decides which entries stay,
and the same score is added to what attention makes of an entry (its log-weight), which is how it learns, though which
ones stay is a choice without a gradient. With ``compression_rate=1`` and no compression to speak of it is a store of
exact states; beside a fast-weight memory (a list in ``memories``) the two are HOLA's pair (2026), a delta state and a
small exact bank, there with the fast weights' own error as the score.

An entry is seen from its birth until ``num_entries`` entries that score higher have been born in its document, which is
a function of the entries alone: how a stream is cut does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, View
from memtx.memory.compressed import BankPlan, CompressedBlocks, CompressedMemory, CompressedState
from memtx.memory.compression import Compression, StridedConvolution
from memtx.memory.reconstruction import Reconstruction
from memtx.memory.recurrent import update_cache
from memtx.memory.window_boundary import EvictedBlocks
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass

SCORE_RESOLUTION = 2.0**-10
"""Scores nearer than this are equal, and of equal ones the newer goes first."""


@state_dataclass
class TopKState(CompressedState):
    """Cache and bank, whose entries are kept in order of birth, newest last.

    Attributes:
        age: (rows, num_entries) int64, tokens read since each entry was born, that token included; 0 for none.
    """

    age: Tensor


@dataclass(frozen=True)
class _ReadContext:
    compressed: CompressedBlocks
    plan: BankPlan
    age: Tensor


class TopKMemory(CompressedMemory):
    """An exact window and a bank of the entries that score highest.

    Args:
        dim: width of the hidden states.
        window: exact positions seen at least (up to window + compression_rate - 1, as the edge moves by blocks).
        compression_rate: positions an entry stands for; 1 for a bank of exact states.
        num_entries: entries kept.
        compression: makes the compression from (dim, compression_rate).
        reconstruction: makes an auxiliary loss from (dim, compression_rate); None for none.

    Raises:
        MemtxError: a number is out of range.
    """

    supports_padding = False
    unbounded = True

    def __init__(
        self,
        dim: int,
        window: int = 512,
        compression_rate: int = 4,
        num_entries: int = 128,
        compression: Callable[[int, int], Compression] = StridedConvolution,
        reconstruction: Callable[[int, int], Reconstruction] | None = None,
    ) -> None:
        super().__init__(dim, window, compression_rate, num_entries, compression, reconstruction)
        # Begins as the bank of the newest: of equal scores the newer entry stays.
        self.score = Linear(dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def init_state(self, batch_size: int, *, like: Tensor) -> TopKState:
        """Return an empty cache and an empty bank."""
        fresh = super().init_state(batch_size, like=like)
        age = torch.zeros(batch_size, self.num_entries, dtype=torch.int64, device=like.device)
        return TopKState(fresh.hidden, fresh.bank, age)

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | blocks crossing the edge | cache | segment]."""
        assert isinstance(state, TopKState)
        edge = self._evicted_blocks(segment)
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        made = self._compress(cache, x, edge, attention)
        weight: Tensor = self.score(torch.cat([bank, made.entries], dim=1))[..., 0]
        # Equal states must score equally whatever batch they stand in, so rounding may not tell them apart.
        plan, age = self._select_entries(
            segment, edge, state.age, (weight.detach().double() / SCORE_RESOLUTION).round()
        )
        return View((bank, made.entries, cache, x), plan.entry_positions, _ReadContext(made, plan, age), weight)

    def _select_entries(
        self, segment: Segment, evicted: EvictedBlocks, age: Tensor, score: Tensor
    ) -> tuple[BankPlan, Tensor]:
        """Return when each of [bank | blocks] is seen, and the ages of the next bank's.

        Args:
            segment: where the call's tokens stand.
            evicted: what crosses in it.
            age: (rows, num_entries) int64, of the bank.
            score: (rows, entries), of both.
        """
        count = score.shape[1]
        there = torch.cat([age > 0, evicted.valid], dim=1)
        document = torch.cat([torch.zeros_like(age), evicted.document_id], dim=1)
        born = torch.cat([-age, evicted.evicted_at], dim=1)
        end = torch.cat([segment.past_document_end[:, None].expand_as(age), evicted.document_end], dim=1)

        # (rows, of it, other): whether the other is of its document and goes before it; of equals the newer does.
        order = torch.arange(count, device=score.device)
        own, other = score[:, :, None], score[:, None]
        ahead = (other > own) | ((other == own) & (order > order[:, None]))
        ahead &= there[:, None] & (document[:, :, None] == document[:, None])
        # Entries are born in order: at the first birth, its own or a later one, by which `num_entries` others are ahead
        # of an entry, it is gone for good.
        gone = (ahead.cumsum(2, dtype=torch.int32) >= self.num_entries) & (order >= order[:, None])
        leaves = gone.any(2)
        left = torch.where(leaves, born.gather(1, gone.int().argmax(2)), INFINITE_OFFSET)
        expires = torch.where(there, torch.minimum(left, end), -INFINITE_OFFSET)
        exact = torch.minimum(evicted.exact_evicted_at, evicted.exact_document_end)
        places = EntryPositions(
            torch.cat([self._block_center(born), evicted.exact_offset], dim=1),
            Visibility(
                torch.cat([born, evicted.exact_offset], dim=1),
                torch.cat([expires, exact], dim=1),
                segment.length,
                (KeyRange(count), KeyRange(evicted.exact_offset.shape[1], -self.cache_length, 1, self.cache_length)),
            ),
        )
        stays = there & ~leaves & (document == segment.document_id[:, -1:])
        kept = stays.int().argsort(dim=1, stable=True)[:, count - self.num_entries :]
        alive = stays.gather(1, kept)
        next_age = torch.where(alive, segment.length - born.gather(1, kept), 0)
        return BankPlan(kept, alive[..., None], places), next_age

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[TopKState, Losses]:
        """Keep the newest states and the highest entries of the newest document."""
        kept: _ReadContext = view.context
        bank, entries, cache, x = view.parts
        losses = self._auxiliary_losses(kept.compressed, segment, activations)
        return TopKState(update_cache(cache, x, segment), kept.plan.next_bank(bank, entries), kept.age), losses

    def ring_layout(self) -> None:
        """Return None: entries leave from anywhere, so a stream is decoded by calls of one token."""
        return None
