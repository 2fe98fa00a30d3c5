"""A bank that keeps the highest-scoring entries instead of the newest.

The choice has no gradient, but the learned score is also the entry's log-weight in attention and learns through it. An
entry is visible from its eviction until ``num_entries`` entries with higher scores have been evicted in its document, a
function of the entries alone, so results do not depend on segmentation. With ``compression_rate=1``, next to
fast weights, this is HOLA's pair (2026) of a delta state and an exact bank, scored there by the fast weights' error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, View
from memtx.memory.compressed import BankPlan, CompressedMemory, CompressedState, EvictedBlocks
from memtx.memory.compression import Compression, Reconstruction, StridedConvolution
from memtx.memory.recurrent import update_cache
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.ops.cpu.linear import Linear
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass

SCORE_RESOLUTION = 2.0**-10
"""Scores that round to the same multiple of this are equal; among equal scores the newer entry ranks higher."""


@state_dataclass
class TopKState(CompressedState):
    """The cache, a bank in order of eviction, and the ages of its entries, ``(batch, num_entries)`` int64.

    An age is the number of tokens read since the eviction, including the evicting token; 0 in empty slots.
    """

    age: Tensor


class TopKMemory(CompressedMemory):
    """An exact window and a bank of the highest-scoring entries.

    Arguments not listed are those of :class:`memtx.memory.compressed.CompressedMemory`.

    Args:
        compression_rate: Positions per entry; 1 for a bank of exact states.

    Raises:
        MemtxError: A number is out of range.
    """

    supports_padding = False
    supports_relative_positions = False
    unbounded = True

    def __init__(
        self,
        dim: int,
        window: int = 512,
        compression_rate: int = 4,
        num_entries: int = 128,
        compression: Callable[[int, int], Compression] = StridedConvolution,
        reconstruction: Callable[[int, int], Reconstruction] | None = None,
        entry_bias: float | None = None,
    ) -> None:
        options = (compression, reconstruction)
        super().__init__(dim, window, compression_rate, num_entries, *options, entry_bias=entry_bias)
        # With equal scores the newer entry stays, so this starts as the bank of the newest.
        self.score = Linear(dim, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def init_state(self, batch_size: int, *, like: Tensor) -> TopKState:
        """Return an empty cache and an empty bank."""
        state = super().init_state(batch_size, like=like)
        age = torch.zeros(batch_size, self.num_entries, dtype=torch.int64, device=like.device)
        return TopKState(state.hidden, state.bank, age)

    def read(self, state: CompressedState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [bank | evicted blocks | cache | segment]."""
        assert isinstance(state, TopKState)
        evicted = self._evicted_blocks(segment)
        bank, cache = state.bank.to(x.dtype), state.hidden.to(x.dtype)
        entries, losses = self._compress(cache, x, evicted, attention)
        scores = self.score(torch.cat([bank, entries], dim=1))[..., 0]
        # Equal states must score equally in any batch, so rounding errors must not tell them apart.
        rounded = (scores.detach().double() / SCORE_RESOLUTION).round()
        plan, age = self._select_entries(segment, evicted, state.age, rounded)
        parts = (bank, entries, cache, x)
        return View(parts, plan.entry_positions, (plan, age), losses=losses, key_bias=scores)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[TopKState, Losses]:
        """Keep the newest states and the highest-scoring entries of the open document."""
        plan, age = view.context
        bank, entries, cache, x = view.parts
        return TopKState(update_cache(cache, x, segment), plan.next_bank(bank, entries), age), view.losses

    def ring_layout(self) -> None:
        """Return None: entries leave from anywhere in the bank, so decoding runs one call per token."""
        return None

    def _select_entries(
        self, segment: Segment, evicted: EvictedBlocks, age: Tensor, scores: Tensor
    ) -> tuple[BankPlan, Tensor]:
        """Return the plan for the rounded scores of [bank | blocks], ``(batch, entries)``, and the next bank's ages."""
        num_candidates = scores.shape[1]
        exists = torch.cat([age > 0, evicted.valid], dim=1)
        evicted_at = torch.cat([-age, evicted.evicted_at], dim=1)
        ids, ends = (tensor.gather(1, evicted.evicted_at) for tensor in (segment.document_id, segment.document_end))
        document = torch.cat([torch.zeros_like(age), ids], dim=1)
        document_end = torch.cat([segment.past_document_end[:, None].expand_as(age), ends], dim=1)

        # (batch, entry, other): True if the other is of the same document and ranks higher; ties go to the newer.
        order = torch.arange(num_candidates, device=scores.device)
        entry_scores, other_scores = scores[:, :, None], scores[:, None]
        higher = (other_scores > entry_scores) | ((other_scores == entry_scores) & (order > order[:, None]))
        higher &= exists[:, None] & (document[:, :, None] == document[:, None])
        # Entries are in order of eviction: an entry is gone for good at the first eviction, its own or a later one, by
        # which `num_entries` others rank higher.
        gone = (higher.cumsum(2, dtype=torch.int32) >= self.num_entries) & (order >= order[:, None])
        leaves = gone.any(2)
        gone_at = torch.where(leaves, evicted_at.gather(1, gone.int().argmax(2)), INFINITE_OFFSET)
        visible_until = torch.where(exists, torch.minimum(gone_at, document_end), -INFINITE_OFFSET)
        exact_until = torch.minimum(evicted.exact_evicted_at, evicted.exact_document_end)
        num_exact = evicted.exact_offset.shape[1]
        entry_positions = EntryPositions(
            torch.cat([self._block_center(evicted_at), evicted.exact_offset], dim=1),
            Visibility(
                torch.cat([evicted_at, evicted.exact_offset], dim=1),
                torch.cat([visible_until, exact_until], dim=1),
                segment.length,
                (KeyRange(num_candidates), KeyRange(num_exact, -self.cache_length, 1, self.cache_length)),
            ),
        )
        stays = exists & ~leaves & (document == segment.document_id[:, -1:])
        indices = stays.int().argsort(dim=1, stable=True)[:, num_candidates - self.num_entries :]
        occupied = stays.gather(1, indices)
        next_age = torch.where(occupied, segment.length - evicted_at.gather(1, indices), 0)
        return BankPlan(indices, occupied[..., None], entry_positions), next_age
