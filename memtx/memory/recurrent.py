"""The recurrent cache of Transformer-XL (Dai et al. 2019, section 3.2): the newest layer inputs, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import check_at_least
from memtx.memory.base import ContentAttention, EntryPositions, LayerActivations, Losses, Memory, View
from memtx.memory.kv_ring import RingLayout
from memtx.ops.attention.mask import KeyRange, Visibility
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class RecurrentState:
    """The cache.

    Attributes:
        hidden: (rows, cache_length, dim), the newest layer inputs of the row's document, newest last.
    """

    hidden: Tensor


class RecurrentMemory(Memory[RecurrentState]):
    """Every position sees itself and the ``window - 1`` before it.

    Args:
        dim: width of the hidden states.
        window: exact positions seen.
        same_length: True: every query sees as many positions, so cutting a stream does not matter (the
            setting Transformer-XL evaluates with). False: what was cached at the beginning of a call is
            seen by all of it, as Transformer-XL trains, and results depend on how long the calls are.

    Raises:
        MemtxError: the window is not positive.
    """

    supports_padding = True
    unbounded = False

    def __init__(self, dim: int, window: int = 512, same_length: bool = True) -> None:
        super().__init__(dim)
        check_at_least(1, window=window)
        self.window = window
        self.same_length = same_length
        self.cache_length = window - 1 if same_length else window

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"window={self.window}, same_length={self.same_length}"

    @property
    def depends_on_segmentation(self) -> bool:
        """Whether calls decide what is seen."""
        return not self.same_length

    def init_state(self, batch_size: int, *, like: Tensor) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState(like.new_zeros(batch_size, self.cache_length, self.dim))

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment]."""
        settings = (RecurrentMemory, self.window, self.same_length)
        return View((state.hidden.to(x.dtype), x), segment.memo(settings, lambda: self._entry_positions(segment)), None)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[RecurrentState, Losses]:
        """Keep the newest."""
        cache, x = view.parts
        return RecurrentState(update_cache(cache, x, segment)), {}

    def ring_layout(self) -> RingLayout | None:
        """Return a slot for every position of the window; none where calls decide what is seen."""
        return RingLayout(self.window, 1, 0, self.cache_length) if self.same_length else None

    def split_state(self, state: RecurrentState) -> tuple[Tensor, Tensor]:
        """Return the cache, and nothing compressed."""
        return state.hidden, state.hidden[:, :0]

    def join_state(self, cache: Tensor, bank: Tensor) -> RecurrentState:
        """Return the cache as a state."""
        return RecurrentState(cache)

    def _entry_positions(self, segment: Segment) -> EntryPositions:
        tick, position, end = locate_entries(segment, self.cache_length)
        if self.same_length:
            expires, span = torch.minimum(tick + self.window, end), self.window
        else:
            expires, span = end, None
        expires = torch.where(position >= 0, expires, -INFINITE_OFFSET)
        section = KeyRange(tick.shape[1], -self.cache_length, 1, span)
        return EntryPositions(tick[:1].double(), Visibility(tick, expires, segment.length, (section,)))


def locate_entries(segment: Segment, cache_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tick, position (negative where nothing is cached) and document end of [cache | segment].

    Args:
        segment: where the call's tokens stand.
        cache_length: of the cache.

    Returns:
        three (rows, cache_length + segment) int64.
    """
    rows = segment.position.shape[0]
    tick = torch.arange(-cache_length, segment.length, device=segment.position.device).expand(rows, -1)
    position = torch.cat([segment.past_length[:, None] + tick[:, :cache_length], segment.position], dim=1)
    end = torch.cat([segment.past_document_end[:, None].expand(-1, cache_length), segment.document_end], dim=1)
    return tick, position, end


def update_cache(cache: Tensor, x: Tensor, segment: Segment) -> Tensor:
    """Return the next cache: the newest entries of [cache | segment], zero where another document's stood.

    Args:
        cache: (rows, cache_length, dim).
        x: (rows, segment, dim).
        segment: where the call's tokens stand.
    """
    places, n = cache.shape[1], x.shape[1]

    def foreign() -> Tensor:
        # Of the newest document, next_position tokens have been read; they stand at the end.
        age = torch.arange(places, 0, -1, device=x.device)
        return (age > segment.next_position[:, None])[..., None]

    if segment.valid_length is not None:
        # By index_select over flattened rows: on CPU many times faster than gather by an expanded index.
        first = segment.valid_length + torch.arange(x.shape[0], device=x.device) * (places + n)
        index = first[:, None] + torch.arange(places, device=x.device)
        kept = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, index.flatten()).view(cache.shape)
    else:
        kept = x[:, n - places :] if n >= places else torch.cat([cache[:, n:], x], dim=1)
    return kept.masked_fill(segment.memo(("newest", places), foreign), 0.0)
