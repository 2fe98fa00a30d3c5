"""The one interface of every memory: read opens, write closes.

``read`` joins the old state with the new segment and says of every entry from when to when it is seen;
attention runs over that; ``write`` trims what was opened to the next state. So a block that is compressed
inside a segment serves the segment's own later queries, and an entry that the trim drops serves its earlier
ones. What a position sees is then a function of positions, and how a stream is cut does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from memtx.memory.kv_ring import RingLayout
from memtx.ops.attention.mask import Visibility
from memtx.segment import Segment

S = TypeVar("S")

Losses = dict[str, Tensor]
"""Named auxiliary losses, weighted, each a scalar to be added to the language model's."""


class ContentAttention(Protocol):
    """A layer's attention by content alone: its projections without positions."""

    def project(self, x: Tensor, projection: str, *, frozen: bool) -> Tensor:
        """Project (rows, entries, dim) to (rows, entries, heads, head_dim).

        Args:
            x: attention inputs.
            projection: "query", "key" or "value"; key and value heads are repeated to the query heads' number.
            frozen: use the weights without letting them learn.
        """
        ...

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as a query without positions sees them that stands so far behind them.

        Args:
            keys: (rows, entries, heads, head_dim), without positions.
            distance: (entries,) float64, in positions.
        """
        ...


@dataclass(frozen=True)
class EntryPositions:
    """Where entries stand and who sees them; shared by all layers whose memories have equal settings.

    Attributes:
        offset: (rows or 1, entries) float64, where each entry stands, in ticks of the call.
        visibility: lifetimes and static bounds, over the entries in order.
    """

    offset: Tensor
    visibility: Visibility


@dataclass(frozen=True)
class View:
    """A memory opened for one segment.

    Attributes:
        parts: what attention makes keys and values of, in order, each (rows, its entries, dim). They are apart
            so that no gradient is computed for carried ones, which have none to take. The segment's own inputs
            are the last of a layer's first memory.
        entry_positions: where the entries of all parts stand and who sees them.
        context: what ``write`` of the same memory needs.
        key_bias: (rows, n), of the first n entries, added to their scaled scores (a log-weight, which learns); None
            for none.
    """

    parts: tuple[Tensor, ...]
    entry_positions: EntryPositions
    context: Any
    key_bias: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(rows, entries, dim): all parts."""
        return torch.cat(self.parts, dim=1)

    @classmethod
    def readout_only(cls, segment: Segment, context: Any) -> View:
        """Return the view of a memory that answers by ``readout`` and adds no entries to the layer's attention."""

        def nowhere() -> EntryPositions:
            none = segment.position.new_zeros(1, 0)
            return EntryPositions(none.double(), Visibility(none, none, segment.length, ()))

        return cls((), segment.memo("nowhere", nowhere), context)


@dataclass(frozen=True)
class Readout:
    """What a memory answers to a segment's queries by itself.

    Attributes:
        out: (rows, heads, segment, head_dim), as attention's outputs before the layer's last projection.
        lse: (rows, heads, segment), the log-sum-exp of the scores that ``out`` was weighed by, so that it is
            joined with the layer's attention as if all had stood in one softmax; minus infinity where nothing
            was there to be read.
        gate: broadcasts to ``out``, from 0 to 1, the share that ``out`` gets; the rest is the attention's. With
            neither, ``out`` is added. With both, the share is the gate times that in one softmax.
    """

    out: Tensor
    lse: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class LayerActivations:
    """What the layer made of the segment, for a memory to write from.

    Attributes:
        inputs: (rows, segment, dim), the attention's inputs.
        outputs: (rows, segment, dim), the attention's outputs.
        attention: the layer's projections.
    """

    inputs: Tensor
    outputs: Tensor
    attention: ContentAttention


class Memory(nn.Module, ABC, Generic[S]):
    """What one layer carries from segment to segment; the module holds weights only.

    A layer may have several. The first is exact: it carries the segment itself, and its entries are attention's
    keys and values. The others answer by :meth:`readout`.

    Args:
        dim: width of the hidden states.

    Attributes:
        write_source: what of the layer a write is made of.
        uses_layer_projections: whether its answers are made by the layer's own projections, and so of its heads' width,
            which may differ from dim / heads.
        has_bank: whether the first section of what it opens stands for what lies beyond the exact window.
        needs_gate: whether it needs a gate in a model that was trained without it; False where what it shows is what
            the layer would have seen with a longer window.
        supports_padding: whether the rows of a call may end before it does (see
            :attr:`memtx.segment.Segment.valid_length`); a kind that says so carries nothing of what stands behind.
        unbounded: whether it can keep what it has read for as long as a document lasts, so that training has to begin
            afresh now and then: see :class:`memtx.training.language.LanguageModule`'s ``state_reset_prob``.
        interval: tokens of a document after which it writes once; None if it writes at every token.
    """

    write_source: ClassVar[Literal["nothing", "input", "output", "top"]] = "input"
    uses_layer_projections: ClassVar[bool] = False
    has_bank: ClassVar[bool] = False
    needs_gate: ClassVar[bool] = True
    supports_padding: ClassVar[bool] = False
    unbounded: ClassVar[bool] = True
    interval: int | None = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def init_state(self, batch_size: int, *, like: Tensor) -> S:
        """Return the state of fresh streams: zeros, of the shapes it keeps for good.

        Args:
            batch_size: streams in the batch.
            like: gives device and dtype.
        """

    @abstractmethod
    def read(self, state: S, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the memory for a segment.

        Args:
            state: as left by the previous segment.
            x: (rows, segment, dim), the attention's inputs.
            segment: where the tokens stand.
            attention: the layer's projections.
        """

    def readout(self, view: View, q: Tensor) -> Readout | None:
        """Answer the segment's queries; None for a memory whose entries attention reads.

        Args:
            view: what ``read`` returned for the segment.
            q: (rows, segment, heads, head_dim), the layer's queries, without positions.
        """
        return None

    @property
    def has_readout(self) -> bool:
        """Whether it answers by :meth:`readout`, so that it must stand behind an exact memory."""
        return type(self).readout is not Memory.readout

    @property
    def depends_on_segmentation(self) -> bool:
        """Whether its results depend on how a stream is cut into calls, as some published schedules' do."""
        return False

    @abstractmethod
    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[S, Losses]:
        """Close the memory: return the next state and the auxiliary losses.

        Args:
            view: what ``read`` returned for the segment.
            segment: where the tokens stand.
            activations: what the layer made of it.
        """

    def on_layer_output(self, state: S, outputs: Tensor, segment: Segment) -> S:
        """Change the next state by what the whole layer made; for a kind whose ``write_source`` is "output".

        Its calls end at the borders of its ``interval``.

        Args:
            state: what ``write`` returned.
            outputs: (rows, segment, dim), the layer's outputs, normed as its inputs are.
            segment: where the tokens stand.
        """
        return state

    # Decoding in place (see memtx.memory.kv_ring). Not abstract: a kind without a layout is decoded by calls of one
    # token and never asked for the rest, one that keeps no compressed entries never for the last.

    def ring_layout(self) -> RingLayout | None:
        """Return the slots that a stream going on token by token needs; None where the kind has no such form."""
        return None

    def split_state(self, state: S) -> tuple[Tensor, Tensor]:
        """Return (rows, cache_length, dim) exact inputs and (rows, num_entries, dim) compressed entries of a state."""
        raise NotImplementedError

    def join_state(self, cache: Tensor, bank: Tensor) -> S:
        """Return the state that holds what :meth:`split_state` returns."""
        raise NotImplementedError

    def compress_block(self, block: Tensor, recent: Tensor, attention: ContentAttention) -> Tensor:
        """Compress one block a row.

        Args:
            block: (rows, compression_rate, dim), the inputs that cross the edge.
            recent: (rows, compression_rate, dim), the newest inputs.
            attention: the layer's projections.

        Returns:
            (rows, dim).
        """
        raise NotImplementedError
