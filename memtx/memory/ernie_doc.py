"""Same-layer recurrence: the cache holds the layer's own outputs (ERNIE-Doc, Ding et al. 2021, section 3.3).

In Transformer-XL's cache a layer sees past outputs of the layer below, so information is lost after as many windows as
there are layers; a layer that sees its own has no such limit. Outputs exist only after the layer has run, so they
replace the inputs where an interval ends: a segment in the paper, here a number of tokens of the document, so results
do not depend on segmentation. The model reads a call up to the next end of an interval in any stream at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memtx.errors import check_at_least
from memtx.memory.base import ContentAttention, LayerActivations, Losses, View
from memtx.memory.recurrent import RecurrentMemory, RecurrentState, update_cache
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class ErnieDocState(RecurrentState):
    """The cache, and the newest layer outputs, newest last, ``(batch, min(interval, cache_length), dim)``."""

    outputs: Tensor


class ErnieDocMemory(RecurrentMemory):
    """A cache of the ``window - 1`` previous positions in which finished intervals are replaced by layer outputs.

    Args:
        dim: Width of the hidden states.
        window: Exact positions visible.
        interval: Tokens of a document after which outputs replace inputs.

    Raises:
        MemtxError: A number is not positive.
    """

    supports_padding = False
    is_resizable = False

    def __init__(self, dim: int, window: int = 512, interval: int = 128) -> None:
        super().__init__(dim, window)
        check_at_least(1, interval=interval)
        self.interval: int = interval

    def init_state(self, batch_size: int, *, like: Tensor) -> ErnieDocState:
        """Return an empty cache."""
        hidden = super().init_state(batch_size, like=like).hidden
        return ErnieDocState(hidden, like.new_zeros(batch_size, min(self.interval, self.cache_length), self.dim))

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment]."""
        assert isinstance(state, ErnieDocState)
        return replace(super().read(state, x, segment, attention), context=state.outputs)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[ErnieDocState, Losses]:
        """Keep the newest inputs; :meth:`on_layer_output` adds the outputs."""
        state, _ = super().write(view, segment, activations)
        return ErnieDocState(state.hidden, view.context), {}

    def on_layer_output(self, state: RecurrentState, outputs: Tensor, segment: Segment) -> ErnieDocState:
        """Keep the newest outputs, and put them into the cache of streams whose interval ends with this segment."""
        assert isinstance(state, ErnieDocState)
        newest = update_cache(state.outputs.to(outputs.dtype), outputs, segment)
        ended = (segment.next_position % self.interval == 0)[:, None, None]
        head, tail = state.hidden.tensor_split([self.cache_length - newest.shape[1]], dim=1)
        return ErnieDocState(torch.cat([head, torch.where(ended, newest.to(tail.dtype), tail)], dim=1), newest)

    def ring_layout(self) -> None:
        """Return None: the cache changes at the end of intervals, so decoding runs one call per token."""
        return None
