"""The recurrent cache of Transformer-XL (Dai et al. 2019, section 3.2): the newest layer inputs, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import at_least
from memtx.memory.base import ContentAttention, Losses, Memory, Places, Trace, View
from memtx.memory.ring import Layout
from memtx.ops.visibility import Section, Visibility
from memtx.segment import FAR, Segment
from memtx.state import state


@state
class RecurrentState:
    """The cache.

    Attributes:
        hidden: (rows, places, dim), the newest layer inputs of the row's document, newest last.
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

    padded = True
    lasting = False

    def __init__(self, dim: int, window: int = 512, same_length: bool = True) -> None:
        super().__init__(dim)
        at_least(1, window=window)
        self.window = window
        self.same_length = same_length
        self.places = window - 1 if same_length else window

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"window={self.window}, same_length={self.same_length}"

    @property
    def cut_matters(self) -> bool:
        """Whether calls decide what is seen."""
        return not self.same_length

    def init_state(self, rows: int, *, like: Tensor) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState(like.new_zeros(rows, self.places, self.dim))

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment]."""
        settings = (RecurrentMemory, self.window, self.same_length)
        return View((state.hidden.to(x.dtype), x), segment.once(settings, lambda: self._places(segment)), None)

    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[RecurrentState, Losses]:
        """Keep the newest."""
        cache, x = view.parts
        return RecurrentState(newest(cache, x, segment)), {}

    def layout(self) -> Layout | None:
        """Return a slot for every position of the window; none where calls decide what is seen."""
        return Layout(self.window, 1, 0, self.places) if self.same_length else None

    def carried(self, state: RecurrentState) -> tuple[Tensor, Tensor]:
        """Return the cache, and nothing compressed."""
        return state.hidden, state.hidden[:, :0]

    def state_of(self, cache: Tensor, bank: Tensor) -> RecurrentState:
        """Return the cache as a state."""
        return RecurrentState(cache)

    def _places(self, segment: Segment) -> Places:
        tick, position, end = cached_places(segment, self.places)
        if self.same_length:
            expires, span = torch.minimum(tick + self.window, end), self.window
        else:
            expires, span = end, None
        expires = torch.where(position >= 0, expires, -FAR)
        section = Section(tick.shape[1], -self.places, 1, span)
        return Places(tick[:1].double(), Visibility(tick, expires, segment.length, (section,)))


def cached_places(segment: Segment, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tick, position (negative where nothing is cached) and document end of [cache | segment].

    Args:
        segment: where the call's tokens stand.
        places: of the cache.

    Returns:
        three (rows, places + segment) int64.
    """
    rows = segment.position.shape[0]
    tick = torch.arange(-places, segment.length, device=segment.position.device).expand(rows, -1)
    position = torch.cat([segment.carried[:, None] + tick[:, :places], segment.position], dim=1)
    end = torch.cat([segment.carried_end[:, None].expand(-1, places), segment.end], dim=1)
    return tick, position, end


def newest(cache: Tensor, x: Tensor, segment: Segment) -> Tensor:
    """Return the next cache: the newest entries of [cache | segment], zero where another document's stood.

    Args:
        cache: (rows, places, dim).
        x: (rows, segment, dim).
        segment: where the call's tokens stand.
    """
    places, n = cache.shape[1], x.shape[1]

    def foreign() -> Tensor:
        # Of the newest document, next_position tokens have been read; they stand at the end.
        age = torch.arange(places, 0, -1, device=x.device)
        return (age > segment.next_position[:, None])[..., None]

    if segment.stop is not None:
        # By index_select over flattened rows: on CPU many times faster than gather by an expanded index.
        first = segment.stop + torch.arange(x.shape[0], device=x.device) * (places + n)
        index = first[:, None] + torch.arange(places, device=x.device)
        kept = torch.cat([cache, x], dim=1).flatten(0, 1).index_select(0, index.flatten()).view(cache.shape)
    else:
        kept = x[:, n - places :] if n >= places else torch.cat([cache[:, n:], x], dim=1)
    return kept.masked_fill(segment.once(("newest", places), foreign), 0.0)
