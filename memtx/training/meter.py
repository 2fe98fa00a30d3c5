"""What a memory is worth: how much worse the same text is predicted with it cleared at every segment.

The difference is the one thing that tells a memory that is used from one that is only carried: the loss alone
falls either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx.data.batch import IGNORED, Batch
from memtx.metrics import BitsPerByte
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

DISTANCES = 5
"""Ranges of distance from the document's beginning that are told apart, each four times as long as the one before."""


def carries(state: MemoryState) -> bool:
    """Return whether a state holds anything beside the position."""
    return any(leaf.numel() for leaf in pytree.tree_leaves(state.layers))


class MemoryMeter(nn.Module):
    """Bits per byte with the memory cleared at every segment, less those with it kept.

    Args:
        segment: tokens a call; nothing is cleared before a document's second segment.
    """

    def __init__(self, segment: int) -> None:
        super().__init__()
        self.segment = segment
        self.whole = BitsPerByte()
        self.ranges = nn.ModuleList(BitsPerByte() for _ in range(DISTANCES))

    def _ranges(self) -> Iterator[tuple[int, BitsPerByte]]:
        for number, metric in enumerate(self.ranges):
            assert isinstance(metric, BitsPerByte)
            yield self.segment * 4**number, metric

    def figures(self) -> Iterator[tuple[str, BitsPerByte]]:
        """Yield ``memory_gain``, of all bytes, then ``memory_gain_N``, of those from N tokens on to 4 N.

        The last range has no end. A range that no text reached gives NaN.
        """
        yield "memory_gain", self.whole
        for low, metric in self._ranges():
            yield f"memory_gain_{low}", metric

    @torch.no_grad()
    def update(self, model: MemoryTransformer, batch: Batch, kept: Tensor, position: Tensor) -> None:
        """Read a batch again, each segment fresh.

        Args:
            model: in eval mode.
            batch: of whole segments, but for the last.
            kept: (rows, tokens), each label's negative log-likelihood in nats as it was with the memory kept.
            position: (rows, tokens) int64, of each token in its document.
        """
        cleared = []
        for at in range(0, batch.tokens.shape[1], self.segment):
            part = slice(at, at + self.segment)
            out = model(batch.tokens[:, part], starts=batch.starts[:, part], labels=batch.labels[:, part])
            assert out.nll is not None
            cleared.append(out.nll)
        gain = torch.cat(cleared, dim=1).double() - kept.double()
        scored = batch.labels != IGNORED
        # A row's bytes are known, not each token's: they are spread evenly over its scored tokens.
        size = batch.bytes.double() / scored.sum(1).clamp(min=1)
        self.whole.update(gain, batch.bytes)
        last = self.segment * 4 ** (DISTANCES - 1)
        for low, metric in self._ranges():
            inside = (position >= low) & ((position < 4 * low) | (low == last))
            metric.update(gain * inside, (scored & inside).sum(1) * size)
