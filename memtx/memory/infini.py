"""Infini-attention (Munkhdalai et al. 2024, section 3.1): a matrix per head, written once per segment.

Keys, values and queries are the layer's own without positions. The paper's segment is an interval of the document here,
so results do not depend on segmentation, and its attention within the segment is the exact memory's window.
:class:`memtx.memory.associative.AssociativeMemory` writes every token and has projections and gates of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtx.errors import check_at_least, check_divisible
from memtx.memory.base import ContentAttention, Memory, Readout, View, project_by_layer
from memtx.memory.intervals import IntervalRuns
from memtx.memory.parts import merge_heads, split_heads
from memtx.segment import Segment
from memtx.state import state_dataclass


@state_dataclass
class InfiniState:
    """The matrices, float32 or wider; the last column of each is the normalization term.

    Attributes:
        matrix: Content after the last finished interval, ``(batch, heads, head_dim, head_dim + 1)``.
        pending: Sum of the open interval's writes, in the same shape.
    """

    matrix: Tensor
    pending: Tensor


class InfiniMemory(Memory[InfiniState]):
    """A compressive memory next to an exact one, mixed with attention by a learned share per head (equation 10).

    Attention keeps its full share in a document's first interval, when nothing is written yet. The share has a learning
    rate of its own (``gate_lr_multiplier``).

    Args:
        dim: Width of the hidden states.
        heads: Heads of the layer.
        interval: Tokens of a document between two writes (the paper's segment, 2048).
        delta_rule: If True, write only what the memory does not return for a key yet (equation 9).
        gate_init: Initial share of the memory before its sigmoid.

    Raises:
        MemtxError: A number is not positive, or dim is not divisible by heads.
    """

    gate_parameters = ("mix_gate",)

    def __init__(
        self, dim: int, heads: int = 4, interval: int = 128, delta_rule: bool = False, gate_init: float = 0.0
    ) -> None:
        super().__init__(dim)
        check_at_least(1, heads=heads, interval=interval)
        check_divisible("Give InfiniMemory the layer's heads.", dim=dim, heads=heads)
        self.heads, self.delta_rule, self.gate_init = heads, delta_rule, gate_init
        self.interval: int = interval
        self.mix_gate = nn.Parameter(torch.full((heads,), gate_init))

    def init_state(self, batch_size: int, *, like: Tensor) -> InfiniState:
        """Return empty matrices."""
        width = self.dim // self.heads
        dtype = torch.promote_types(like.dtype, torch.float32)
        matrix = like.new_zeros(batch_size, self.heads, width, width + 1, dtype=dtype)
        return InfiniState(matrix, matrix.clone())

    def read(self, state: InfiniState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Write the call's tokens and read the matrix of each interval."""
        runs = IntervalRuns.from_segment(segment, self.interval)
        parts = project_by_layer(self, self.heads, x, attention, "query", "key", "value")
        matrix, pending, reads = state.matrix, state.pending, []
        projected = torch.cat(parts, dim=-1).to(matrix.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for index, part in enumerate(runs.split(projected)):
                q, k, v = (split_heads(projection, self.heads) for projection in part.chunk(3, dim=-1))
                starts_document = runs.starts_document[:, index, None, None, None]
                starts_interval = runs.starts_interval[:, index, None, None, None]
                matrix = torch.where(starts_interval, matrix + pending, matrix).masked_fill(starts_document, 0.0)
                pending = pending.masked_fill(starts_interval, 0.0)
                addresses, query_addresses = F.elu(k) + 1.0, F.elu(q) + 1.0
                reads.append(merge_heads(_retrieve(query_addresses, matrix)))
                new = v - _retrieve(addresses, matrix) if self.delta_rule else v
                addresses = addresses * runs.token_mask[:, index, None, :, None]
                pending = pending + addresses.mT @ F.pad(new, (0, 1), value=1.0)
        is_written = (segment.position >= self.interval)[..., None]
        return View.readout_only(segment, (runs.join(reads).to(x.dtype), is_written), InfiniState(matrix, pending))

    def readout(self, view: View, q: Tensor) -> Readout:
        """Return the values read, with the memory's share."""
        out, is_written = view.context
        gate = torch.sigmoid(self.mix_gate)[:, None, None] * is_written[:, None]
        return Readout(split_heads(out, self.heads), gate=gate)


def _retrieve(addresses: Tensor, matrix: Tensor) -> Tensor:
    """Return what a matrix holds at addresses ``(batch, heads, tokens, head_dim)``; zeros if empty (equation 7)."""
    read = addresses @ matrix
    return read[..., :-1] / read[..., -1:].clamp(min=torch.finfo(read.dtype).eps)
