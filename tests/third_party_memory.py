"""A third party's memory in one file, from public names only: a running sum over the document, read as a mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class Sums:
    total: Tensor  # (batch, dim)


class RunningMean(Memory[Sums]):
    """Adds a learned map of the mean of the document so far."""

    def __init__(self, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim)
        self.gain = gain
        self.map = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch_size: int, *, like: Tensor) -> Sums:
        return Sums(like.new_zeros(batch_size, self.dim))

    def read(self, state: Sums, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        same = segment.document_id[:, :, None] == segment.document_id[:, None, :]
        total = torch.einsum("bqk,bkd->bqd", same.tril().to(x.dtype), x)
        return View.readout_only(segment, total + state.total[:, None] * (segment.document_id == 0)[..., None])

    def readout(self, view: View, q: Tensor) -> Readout:
        batch_size, length, heads, _ = q.shape
        assert view.entry_positions.visibility.num_queries == length
        mean = self.gain * self.map(view.context) / 64
        return Readout(mean.view(batch_size, length, heads, -1).transpose(1, 2))

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[Sums, Losses]:
        return Sums(view.context[:, -1]), {}
