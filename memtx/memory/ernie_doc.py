"""Same-layer recurrence: past states of a layer are its outputs, not its inputs (ERNIE-Doc, Ding et al. 2021, 3.3).

In Transformer-XL's cache a layer sees what the layer below made of the past, so what reaches a position goes down a
layer with every window and ends after as many windows as there are layers. Here a layer sees what it made itself, and
there is no such end. An output exists only once the layer has run, so within an interval of tokens inputs are seen, as
ever, and where it ends the interval's outputs take their places. There an interval is a segment; here it is counted in
tokens of the document, so how input arrives does not matter, and the model reads a call up to the next border of any
row at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import check_at_least
from memtx.memory.base import LayerActivations, Losses, View
from memtx.memory.recurrent import RecurrentMemory, RecurrentState, update_cache
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class ErnieDocState(RecurrentState):
    """The cache, in which intervals that have ended stand by their outputs.

    Attributes:
        outputs: (rows, at most interval, dim), the layer's newest outputs, newest last.
    """

    outputs: Tensor


class ErnieDocMemory(RecurrentMemory):
    """Every position sees itself and the ``window - 1`` before it, past intervals by the layer's outputs.

    Args:
        dim: width of the hidden states.
        window: exact positions seen.
        interval: tokens of a document after which their outputs take the places of their inputs.

    Raises:
        MemtxError: a number is not positive.
    """

    write_source = "output"
    supports_padding = False

    def __init__(self, dim: int, window: int = 512, interval: int = 128) -> None:
        super().__init__(dim, window)
        check_at_least(1, interval=interval)
        self.interval: int = interval

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"window={self.window}, interval={self.interval}"

    def init_state(self, batch_size: int, *, like: Tensor) -> ErnieDocState:
        """Return an empty cache."""
        hidden = super().init_state(batch_size, like=like).hidden
        return ErnieDocState(hidden, like.new_zeros(batch_size, min(self.interval, self.cache_length), self.dim))

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: object) -> View:
        """Open [cache | segment]."""
        assert isinstance(state, ErnieDocState)
        settings = (RecurrentMemory, self.window, True)
        places = segment.memo(settings, lambda: self._entry_positions(segment))
        return View((state.hidden.to(x.dtype), x), places, state.outputs)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[ErnieDocState, Losses]:
        """Keep the newest inputs; outputs come by :meth:`on_layer_output`."""
        cache, x = view.parts
        return ErnieDocState(update_cache(cache, x, segment), view.context), {}

    def on_layer_output(self, state: RecurrentState, outputs: Tensor, segment: Segment) -> ErnieDocState:
        """Take the layer's outputs, and put them into the cache in the rows whose interval has just ended."""
        assert isinstance(state, ErnieDocState)
        kept = update_cache(state.outputs.to(outputs.dtype), outputs, segment)
        count = kept.shape[1]
        ended = (segment.next_position % self.interval == 0)[:, None, None]
        head, tail = state.hidden[:, : self.cache_length - count], state.hidden[:, self.cache_length - count :]
        return ErnieDocState(torch.cat([head, torch.where(ended, kept.to(tail.dtype), tail)], dim=1), kept)

    def ring_layout(self) -> None:
        """Return None: the cache changes at borders, so a stream is decoded by calls of one token."""
        return None
