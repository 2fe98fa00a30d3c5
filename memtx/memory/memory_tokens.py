"""A layer's part of memory tokens (Recurrent Memory Transformer, Bulatov et al. 2022, section 3).

After every interval the model's own write tokens pass through all layers; the top layer's outputs enter the bottom
layer as the memory tokens that the next interval reads (:mod:`memtx.models.segmented_forward`). In the paper an
interval is a segment; here it is a number of tokens of the document, so results do not depend on segmentation. Write
tokens are learned and see the memory tokens like any other token; the paper repeats the memory tokens instead. As
published, without a window that slides over the ends of segments: :class:`memtx.memory.rmt.RMTMemory`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtx.errors import check_at_least
from memtx.memory.base import ContentAttention, Memory, Readout, View
from memtx.ops.attention.reference import softmax_attention
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class TokenState:
    """The memory tokens at the layer's input, ``(batch, num_tokens, dim)``."""

    hidden: Tensor


@dataclass(frozen=True)
class _ReadContext:
    entries: Tensor
    in_first_interval: Tensor
    attention: ContentAttention


class TokenMemory(Memory[TokenState]):
    """Memory tokens next to an exact memory whose window holds an interval and the write tokens after it.

    All layers of a model have one, with equal settings.

    Args:
        dim: Width of the hidden states.
        num_tokens: Number of memory tokens.
        interval: Tokens of a document between two writes.

    Raises:
        MemtxError: A number is out of range.
    """

    uses_layer_projections = True

    def __init__(self, dim: int, num_tokens: int = 8, interval: int = 128) -> None:
        super().__init__(dim)
        check_at_least(1, num_tokens=num_tokens, interval=interval)
        self.num_tokens = num_tokens
        self.interval: int = interval
        # Read during a document's first interval; initialized on the scale of normalized inputs.
        self.initial_tokens = nn.Parameter(torch.randn(num_tokens, dim))

    def init_state(self, batch_size: int, *, like: Tensor) -> TokenState:
        """Return zeros: no tokens written."""
        return TokenState(like.new_zeros(batch_size, self.num_tokens, self.dim))

    def read(self, state: TokenState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the document's memory tokens, which are the learned ones in its first interval.

        The next state keeps them; the model replaces them where an interval ends.
        """
        in_first_interval = segment.position < self.interval
        hidden = state.hidden.to(x.dtype)
        initial = self.initial_tokens.to(x.dtype).expand_as(hidden)
        next_state = TokenState(torch.where(in_first_interval[:, -1:, None], initial, hidden))
        entries = torch.cat([initial, hidden], dim=1)
        return View.readout_only(segment, _ReadContext(entries, in_first_interval, attention), next_state)

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the memory tokens with the layer's own keys and values, without positions."""
        context: _ReadContext = view.context
        project, entries, sees_initial = context.attention.project, context.entries, context.in_first_interval
        k, v = (project(entries, projection, frozen=False).transpose(1, 2) for projection in ("key", "value"))
        # (batch, 1, length, 2 * num_tokens)
        mask = torch.stack([sees_initial, ~sees_initial], dim=-1).repeat_interleave(self.num_tokens, dim=-1)[:, None]
        out, lse = softmax_attention(q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5, mask, v)
        return Readout(out, lse=lse)
