"""Memory tokens (Recurrent Memory Transformer, Bulatov et al. 2022, section 3), a layer's part of them.

After every interval some tokens of the model's own ask through all layers what to remember; what leaves the top enters
the bottom as the tokens that the next interval reads. In a layer these are entries that every query sees. There an
interval is a segment; here it is counted in tokens of the document, so how input arrives does not matter, and the
model reads a call up to the next border of any row at a time (:mod:`memtx.models.segmented_forward`). There the
asking tokens are the read ones repeated; here they are learned, and read those like every other token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memtx.errors import check_at_least
from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.ops.attention.reference import softmax_attention
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class TokenState:
    """What the layer's attention reads of the memory tokens.

    Attributes:
        hidden: (rows, num_tokens, dim), their layer inputs.
    """

    hidden: Tensor


@dataclass(frozen=True)
class _ReadContext:
    entries: Tensor
    in_first_interval: Tensor
    next_state: TokenState
    attention: ContentAttention


class TokenMemory(Memory[TokenState]):
    """Memory tokens beside an exact memory whose window holds an interval and the tokens after it.

    All layers of a model have them, with equal settings.

    Args:
        dim: width of the hidden states.
        num_tokens: memory tokens.
        interval: tokens of a document after which they are written once.

    Raises:
        MemtxError: a number is out of range.
    """

    write_source = "top"
    uses_layer_projections = True

    def __init__(self, dim: int, num_tokens: int = 8, interval: int = 128) -> None:
        super().__init__(dim)
        check_at_least(1, num_tokens=num_tokens, interval=interval)
        self.num_tokens = num_tokens
        self.interval: int = interval
        # A document's first interval reads learned entries, layer by layer, of the size of normed inputs.
        self.initial_tokens = nn.Parameter(torch.randn(num_tokens, dim))

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"num_tokens={self.num_tokens}, interval={self.interval}"

    def init_state(self, batch_size: int, *, like: Tensor) -> TokenState:
        """Return no entries."""
        return TokenState(like.new_zeros(batch_size, self.num_tokens, self.dim))

    def read(self, state: TokenState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the document's entries: learned ones in its first interval."""
        young = segment.position < self.interval
        hidden = state.hidden.to(x.dtype)
        initial = self.initial_tokens.to(x.dtype).expand_as(hidden)
        after = TokenState(torch.where(young[:, -1:, None], initial, hidden))
        return View.readout_only(segment, _ReadContext(torch.cat([initial, hidden], dim=1), young, after, attention))

    def readout(self, view: View, q: Tensor) -> Readout:
        """Attend to the entries by the layer's own keys and values, without positions."""
        kept: _ReadContext = view.context
        k, v = (kept.attention.project(kept.entries, part, frozen=False).transpose(1, 2) for part in ("key", "value"))
        # (rows, 1, segment, 2 num_tokens): the learned ones, or the carried ones.
        seen = torch.stack([kept.in_first_interval, ~kept.in_first_interval], dim=-1).repeat_interleave(
            self.num_tokens, dim=-1
        )[:, None]
        out, lse = softmax_attention(q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5, seen, v)
        return Readout(out, lse=lse)

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[TokenState, Losses]:
        """Keep the entries; the model puts new ones in their place where an interval ends."""
        kept: _ReadContext = view.context
        return kept.next_state, {}
