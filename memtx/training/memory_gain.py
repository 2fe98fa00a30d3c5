"""What a memory is worth: how much worse the same text is predicted with it cleared at every segment.

The difference is the one thing that tells a memory that is used from one that is only carried: the loss alone
falls either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtx.data.batch import IGNORE_INDEX, Batch
from memtx.metrics import BitsPerByte
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState

NUM_DISTANCE_RANGES = 5
"""Ranges of distance from the document's beginning that are told apart, each four times as long as the one before."""


def has_memory(state: MemoryState) -> bool:
    """Return whether a state holds anything beside the position."""
    return any(leaf.numel() for leaf in pytree.tree_leaves(state.layers))


class MemoryGain(nn.Module):
    """Bits per byte with the memory cleared at every segment, less those with it kept.

    Args:
        segment_length: tokens a call; nothing is cleared before a document's second segment.
    """

    def __init__(self, segment_length: int) -> None:
        super().__init__()
        self.segment_length = segment_length
        self.total = BitsPerByte()
        self.by_distance = nn.ModuleList(BitsPerByte() for _ in range(NUM_DISTANCE_RANGES))

    def _distance_ranges(self) -> Iterator[tuple[int, BitsPerByte]]:
        for number, metric in enumerate(self.by_distance):
            assert isinstance(metric, BitsPerByte)
            yield self.segment_length * 4**number, metric

    def named_metrics(self) -> Iterator[tuple[str, BitsPerByte]]:
        """Yield ``memory_gain``, of all bytes, then ``memory_gain_N``, of those from N tokens on to 4 N.

        The last range has no end. A range that no text reached gives NaN.
        """
        yield "memory_gain", self.total
        for low, metric in self._distance_ranges():
            yield f"memory_gain_{low}", metric

    @torch.no_grad()
    def update(self, model: MemoryTransformer, batch: Batch, nll: Tensor, positions: Tensor) -> None:
        """Read a batch again, each segment fresh.

        Args:
            model: in eval mode.
            batch: of whole segments, but for the last.
            nll: (rows, tokens), each label's negative log-likelihood in nats as it was with the memory kept.
            positions: (rows, tokens) int64, of each token in its document.
        """
        cleared = []
        for at in range(0, batch.tokens.shape[1], self.segment_length):
            part = slice(at, at + self.segment_length)
            out = model(
                batch.tokens[:, part], document_starts=batch.document_starts[:, part], labels=batch.labels[:, part]
            )
            assert out.nll is not None
            cleared.append(out.nll)
        gain = torch.cat(cleared, dim=1).double() - nll.double()
        scored = batch.labels != IGNORE_INDEX
        # A row's bytes are known, not each token's: they are spread evenly over its scored tokens.
        size = batch.num_bytes.double() / scored.sum(1).clamp(min=1)
        self.total.update(gain, batch.num_bytes)
        last = self.segment_length * 4 ** (NUM_DISTANCE_RANGES - 1)
        for low, metric in self._distance_ranges():
            inside = (positions >= low) & ((positions < 4 * low) | (low == last))
            metric.update(gain * inside, (scored & inside).sum(1) * size)
