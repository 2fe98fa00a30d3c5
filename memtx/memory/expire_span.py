"""Expire-Span (Sukhbaatar et al. 2021, section 4): a cache in which every entry has a learned span.

An entry is fully visible for e_i tokens after its own, then its attention weight falls linearly to 0 within a ramp:
m_ti = clamp(1 + (e_i - (t - i)) / R, 0, 1), and weights are normalized after the factor. So spans learn from the
entries under the ramp alone. Expired entries are not attended to, but the cache has a fixed size, as all states have.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, EntryPositions, View
from memtx.memory.recurrent import RecurrentMemory, RecurrentState
from memtx.ops.attention.bias import ExpireBias
from memtx.segment import Segment


class ExpireSpanMemory(RecurrentMemory):
    """An exact memory whose entries expire after a span that a linear map of the layer's input predicts.

    Args:
        dim: Width of the hidden states.
        max_span: Longest span L, in tokens; the span is L times a sigmoid (equation 3).
        ramp: Tokens R within which an entry fades after its span.
        span_penalty: Weight of the mean span of new tokens, in tokens, as a loss (equation 8).
        initial_fraction: Initial span as a fraction of ``max_span``.

    Raises:
        MemtxError: A number is out of range.
    """

    def __init__(
        self, dim: int, max_span: int = 1024, ramp: int = 64, span_penalty: float = 1e-6, initial_fraction: float = 0.1
    ) -> None:
        check_at_least(1, max_span=max_span, ramp=ramp)
        check_at_least(0, span_penalty=span_penalty)
        super().__init__(dim, max_span + ramp)
        if not 0 < initial_fraction < 1:
            raise MemtxError(f"initial_fraction is {initial_fraction}.", "Give a number between 0 and 1.")
        self.max_span, self.ramp, self.span_penalty = max_span, ramp, span_penalty
        self.initial_fraction = initial_fraction
        self.span_predictor = nn.Linear(dim, 1)
        nn.init.zeros_(self.span_predictor.weight)
        nn.init.constant_(self.span_predictor.bias, -math.log(1 / initial_fraction - 1))

    @property
    def is_resizable(self) -> bool:
        """False, as spans are fractions of the longest."""
        return False

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment], where every entry has its span."""
        view = super().read(state, x, segment, attention)
        positions, dtype = view.entry_positions, torch.promote_types(x.dtype, torch.float32)
        visibility, num_cached = positions.visibility, view.parts[0].shape[1]
        spans = self.max_span * torch.sigmoid(self.span_predictor(torch.cat(view.parts, dim=1))[..., 0].to(dtype))
        last = (spans.detach() + self.ramp).ceil().long()
        until = torch.minimum(visibility.visible_from + last, visibility.visible_until)
        expiring = EntryPositions(positions.offset, replace(visibility, visible_until=until, _values={}))
        losses = {}
        if self.span_penalty and self.training:
            losses["span_penalty"] = self.span_penalty * spans[:, num_cached:].mean()
        add_bias = partial(ExpireBias, spans, positions.offset, self.ramp)
        return replace(view, entry_positions=expiring, losses=losses, extend_bias=add_bias)

    def ring_layout(self) -> None:
        """Return None: visibility depends on the entries, so decoding runs one call per token."""
        return None
