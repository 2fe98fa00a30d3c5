"""A third party's memory in one file: a sum over the document, read as a mean, that imports what is public only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memtx.memory.base import ContentAttention, LayerActivations, Losses, Memory, Readout, View
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class Sums:
    total: Tensor  # (rows, dim)


class RunningMean(Memory[Sums]):
    """Adds the mean of all that the document held so far, by a learned map."""

    def __init__(self, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim)
        self.gain = gain
        self.map = nn.Linear(dim, dim, bias=False)

    def init_state(self, batch_size: int, *, like: Tensor) -> Sums:
        return Sums(like.new_zeros(batch_size, self.dim))

    def read(self, state: Sums, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        same = segment.document_id[:, :, None] == segment.document_id[:, None, :]
        total = torch.einsum("rqk,rkd->rqd", same.tril().to(x.dtype), x)
        return View.readout_only(segment, total + state.total[:, None] * (segment.document_id == 0)[..., None])

    def readout(self, view: View, q: Tensor) -> Readout:
        rows, length, heads, _ = q.shape
        queries = view.entry_positions.visibility.num_queries
        assert queries == length
        mean = self.gain * self.map(view.context) / 64
        return Readout(mean.view(rows, length, heads, -1).transpose(1, 2))

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[Sums, Losses]:
        return Sums(view.context[:, -1]), {}
