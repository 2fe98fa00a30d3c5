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

from memtx.memory.ring import Layout
from memtx.ops.visibility import Visibility
from memtx.segment import Segment

S = TypeVar("S")

Losses = dict[str, Tensor]
"""Named auxiliary losses, weighted, each a scalar to be added to the language model's."""


class ContentAttention(Protocol):
    """A layer's attention by content alone: its projections without positions."""

    def project(self, x: Tensor, part: str, *, frozen: bool) -> Tensor:
        """Project (rows, entries, dim) to (rows, entries, heads, head_dim).

        Args:
            x: attention inputs.
            part: "query", "key" or "value"; key and value heads are repeated to the query heads' number.
            frozen: use the weights without letting them learn.
        """
        ...

    def apart(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys as a query without positions sees them that stands so far behind them.

        Args:
            keys: (rows, entries, heads, head_dim), without positions.
            distance: (entries,) float64, in positions.
        """
        ...


@dataclass(frozen=True)
class Places:
    """Where entries stand and who sees them; shared by all layers whose memories have equal settings.

    Attributes:
        tick: (rows or 1, entries) float64, where each entry stands, in ticks of the call.
        visibility: lifetimes and static bounds, over the entries in order.
    """

    tick: Tensor
    visibility: Visibility


@dataclass(frozen=True)
class View:
    """A memory opened for one segment.

    Attributes:
        parts: what attention makes keys and values of, in order, each (rows, its entries, dim). They are apart
            so that no gradient is computed for carried ones, which have none to take. The segment's own inputs
            are the last of a layer's first memory.
        places: where the entries of all parts stand and who sees them.
        kept: what ``write`` of the same memory needs.
        weight: (rows, n), of the first n entries, added to their scaled scores (a log-weight, which learns); None
            for none.
    """

    parts: tuple[Tensor, ...]
    places: Places
    kept: Any
    weight: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(rows, entries, dim): all parts."""
        return torch.cat(self.parts, dim=1)

    @classmethod
    def apart(cls, segment: Segment, kept: Any) -> View:
        """Return the view of a memory that answers by ``recall`` and adds no entries to the layer's attention."""

        def nowhere() -> Places:
            none = segment.position.new_zeros(1, 0)
            return Places(none.double(), Visibility(none, none, segment.length, ()))

        return cls((), segment.once("nowhere", nowhere), kept)


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
class Trace:
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
    keys and values. The others answer by :meth:`recall`.

    Args:
        dim: width of the hidden states.

    Attributes:
        depends_on: what of the layer a write is made of.
        by_layer: whether its answers are made by the layer's own projections, and so of its heads' width, which may
            differ from dim / heads.
        beyond: whether the first section of what it opens stands for what lies beyond the exact window.
        native: whether what it shows is what the layer would have seen with a longer window, so that it needs no gate
            in a model that was trained without it.
        padded: whether the rows of a call may end before it does (see :attr:`memtx.segment.Segment.stop`); a kind that
            says so carries nothing of what stands behind.
        lasting: whether it can keep what it has read for as long as a document lasts, so that training has to begin
            afresh now and then: see :class:`memtx.training.language.LanguageModule`'s ``restarts``.
        interval: tokens of a document after which it writes once; None if it writes at every token.
    """

    depends_on: ClassVar[Literal["nothing", "input", "output", "top"]] = "input"
    by_layer: ClassVar[bool] = False
    beyond: ClassVar[bool] = False
    native: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    lasting: ClassVar[bool] = True
    interval: int | None = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def init_state(self, rows: int, *, like: Tensor) -> S:
        """Return the state of fresh streams: zeros, of the shapes it keeps for good.

        Args:
            rows: streams in the batch.
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

    def recall(self, view: View, q: Tensor) -> Readout | None:
        """Answer the segment's queries; None for a memory whose entries attention reads.

        Args:
            view: what ``read`` returned for the segment.
            q: (rows, segment, heads, head_dim), the layer's queries, without positions.
        """
        return None

    @property
    def answers(self) -> bool:
        """Whether it answers by :meth:`recall`, so that it must stand behind an exact memory."""
        return type(self).recall is not Memory.recall

    @property
    def cut_matters(self) -> bool:
        """Whether its results depend on how a stream is cut into calls, as some published schedules' do."""
        return False

    @abstractmethod
    def write(self, view: View, segment: Segment, trace: Trace) -> tuple[S, Losses]:
        """Close the memory: return the next state and the auxiliary losses.

        Args:
            view: what ``read`` returned for the segment.
            segment: where the tokens stand.
            trace: what the layer made of it.
        """

    def settle(self, state: S, outputs: Tensor, segment: Segment) -> S:
        """Change the next state by what the whole layer made; for a kind whose ``depends_on`` is "output".

        Its calls end at the borders of its ``interval``.

        Args:
            state: what ``write`` returned.
            outputs: (rows, segment, dim), the layer's outputs, normed as its inputs are.
            segment: where the tokens stand.
        """
        return state

    # Decoding in place (see memtx.memory.ring). Not abstract: a kind without a layout is decoded by calls of one token
    # and never asked for the rest, one that keeps no compressed entries never for the last.

    def layout(self) -> Layout | None:
        """Return the slots that a stream going on token by token needs; None where the kind has no such form."""
        return None

    def carried(self, state: S) -> tuple[Tensor, Tensor]:
        """Return (rows, places, dim) exact inputs and (rows, length, dim) compressed entries of a state."""
        raise NotImplementedError

    def state_of(self, cache: Tensor, bank: Tensor) -> S:
        """Return the state that holds what :meth:`carried` returns."""
        raise NotImplementedError

    def compressed(self, block: Tensor, probe: Tensor, attention: ContentAttention) -> Tensor:
        """Compress one block a row.

        Args:
            block: (rows, rate, dim), the inputs that cross the edge.
            probe: (rows, rate, dim), the newest inputs.
            attention: the layer's projections.

        Returns:
            (rows, dim).
        """
        raise NotImplementedError
