"""The interface of every memory: ``read`` opens it for a segment, ``write`` closes it.

``read`` joins the old state with the segment and says from when to when each entry is visible. Attention runs over
these entries, and ``write`` trims them to the next state. So a block compressed inside a segment serves that segment's
later queries, and an entry dropped by the trim its earlier ones. Visibility is a function of positions alone.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from memtx.errors import MemtxError
from memtx.ops.attention.bias import ScoreBias
from memtx.ops.attention.mask import BankSplit, Visibility
from memtx.ops.attention.scores import EntryCounts
from memtx.segment import Segment

S = TypeVar("S")

Losses = dict[str, Tensor]
"""Auxiliary losses by name: weighted scalars that are added to the language model's loss."""


class ContentAttention(Protocol):
    """A layer's attention by content: its projections, without positions."""

    def project(self, x: Tensor, projection: str, *, frozen: bool) -> Tensor:
        """Project attention inputs, ``(batch, entries, dim)``, to ``(batch, entries, heads, head_dim)``.

        The projection is "query", "key" or "value", of which the last two are repeated to the number of query heads;
        ``frozen`` uses the weights without gradients.
        """

    def apply_relative(self, keys: Tensor, distance: Tensor) -> Tensor:
        """Return keys without positions, ``(batch, entries, heads, head_dim)``, as such queries see them from ahead.

        The distance is the number of positions by which the query is ahead of each key, ``(entries,)`` float64.
        """


@dataclass(frozen=True)
class EntryPositions:
    """Positions and visibility of entries; shared by all layers whose memories have equal settings.

    Attributes:
        offset: Offsets of the entries, ``(batch or 1, entries)`` float64.
        visibility: First and last query that sees each entry, with static bounds, in order.
        bank_split: The visibility split into what lies beyond the exact window and the window. None splits off the
            first key range.
        counts: Computes the distances, in entries, of those before the exact ones. None if there are none.
    """

    offset: Tensor
    visibility: Visibility
    bank_split: BankSplit | None = None
    counts: Callable[[], EntryCounts] | None = None


@dataclass(frozen=True)
class View:
    """A memory opened for one segment.

    Attributes:
        parts: Entries that attention makes keys and values from, in order, each ``(batch, its entries, dim)``. Separate
            tensors, so that no gradient is computed for carried ones. The segment's own inputs are the last part of a
            layer's first memory.
        entry_positions: Positions and visibility of the entries of all parts.
        context: Anything that ``readout`` and ``write`` of the same memory need.
        next_state: State after the segment, if ``read`` computes it.
        losses: Auxiliary losses, if ``read`` computes them.
        key_bias: Learnable log-weights of the first n entries, ``(batch, n)``, added to their scaled scores. None
            disables them.
    """

    parts: tuple[Tensor, ...]
    entry_positions: EntryPositions
    context: Any = None
    next_state: Any = None
    losses: Losses = field(default_factory=dict)
    key_bias: Tensor | None = None
    extend_bias: Callable[[Any], ScoreBias] | None = None

    @classmethod
    def readout_only(cls, segment: Segment, context: Any, next_state: Any = None, losses: Losses | None = None) -> View:
        """Return the view of a memory that adds no entries to the layer's attention."""

        def no_entries() -> EntryPositions:
            empty = segment.position.new_zeros(1, 0)
            return EntryPositions(empty.double(), Visibility(empty, empty, segment.length, ()))

        return cls((), segment.memo("no entries", no_entries), context, next_state, losses or {})


@dataclass(frozen=True)
class Readout:
    """A memory's own answer to a segment's queries, combined with the layer's attention.

    With neither ``lse`` nor ``gate``, ``out`` is added to the attention output. With both, the gate scales the share
    that ``out`` would have in a joint softmax.

    Attributes:
        out: Output before the layer's last projection, ``(batch, heads, length, head_dim)``.
        lse: Log-sum-exp of the scores behind ``out``, ``(batch, heads, length)``, minus infinity where nothing was
            visible. It joins ``out`` with the attention output as in a single softmax.
        gate: Share of ``out`` from 0 to 1, broadcastable to it; the attention output gets the rest.
    """

    out: Tensor
    lse: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class LayerActivations:
    """Attention's inputs and outputs, each ``(batch, length, dim)``, and projections, for a memory to write from."""

    inputs: Tensor
    outputs: Tensor
    attention: ContentAttention


class Memory(nn.Module, ABC, Generic[S]):
    """The part of a layer that carries a state from segment to segment; the module itself holds only weights.

    A layer may have several. The first is exact: it carries the segment itself and supplies attention's keys and
    values. The others are a :class:`ReadoutMemory` each. A memory that can be decoded in place is a
    :class:`memtx.memory.kv_ring.RingDecodable`.

    Args:
        dim: Width of the hidden states.

    Attributes:
        uses_layer_projections: If True, readouts are made by the layer's projections and so fit any head width;
            otherwise they are ``dim`` wide over all heads.
        has_bank: If True, its views hold entries beyond the exact window (see :attr:`EntryPositions.bank_split`).
        entry_bias: Initial log-weight of these entries, learned per head. None disables it.
        gate_parameters: Names of the attributes, parameters or modules, that decide how much of the memory is read.
            They are trained with a learning rate of their own, without weight decay.
        needs_gate: If True, a model trained without this memory needs a gate to start unchanged. False for a memory
            whose entries the layer would have seen with a longer window.
        supports_padding: If True, sequences of a batch may end before the segment does (see
            :attr:`memtx.segment.Segment.valid_length`), and nothing of the padding is carried.
        unbounded: If True, content can survive for as long as the document lasts, so training must start from a fresh
            state now and then (``state_reset_prob`` of :class:`memtx.training.language.LanguageModule`).
        depends_on_segmentation: If True, results depend on how a stream is cut into segments, as in some published
            schedules.
        supports_relative_positions: If False, the distances of its entries are not known in entries (see
            :class:`memtx.layers.positions.relative.RelativePositions`).
        interval: Tokens of a document between two writes. None means every token is written.
        changes_layer_input: If True, the memory implements :meth:`on_layer_input`.
        is_hidden: If True, nothing beyond the exact window is read from this memory, which is carried as before (see
            :func:`memtx.models.sources.without_source`).
    """

    uses_layer_projections: ClassVar[bool] = False
    has_bank: bool = False
    entry_bias: float | None = None
    gate_parameters: ClassVar[tuple[str, ...]] = ()
    needs_gate: ClassVar[bool] = True
    supports_padding: ClassVar[bool] = False
    unbounded: ClassVar[bool] = True
    changes_layer_input: ClassVar[bool] = False
    depends_on_segmentation: bool = False
    supports_relative_positions: bool = True
    interval: int | None = None
    is_hidden: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @property
    def needs_layer_output(self) -> bool:
        """If True, the memory implements :meth:`on_layer_output`, and segments are cut where its intervals end."""
        return type(self).on_layer_output is not Memory.on_layer_output

    @abstractmethod
    def init_state(self, batch_size: int, *, like: Tensor) -> S:
        """Return the state of fresh streams, zeros in its final shapes, on the device and in the dtype of ``like``."""

    @abstractmethod
    def read(self, state: S, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open the memory in its state after the previous segment, for attention inputs x ``(batch, length, dim)``."""

    def transform_output(self, view: View, outputs: Tensor, segment: Segment) -> tuple[Tensor, View]:
        """Return attention's outputs, ``(batch, length, dim)``, as the memory changes them, and its view for ``write``.

        By default, they stay the same.
        """
        return outputs, view

    def write(self, view: View, segment: Segment, activations: LayerActivations) -> tuple[S, Losses]:
        """Close the memory: return the next state and the auxiliary losses; ``view`` is the segment's from ``read``.

        By default, those that ``read`` put into the view.
        """
        if view.next_state is None:
            raise MemtxError(f"{type(self).__name__} gives no next state.", "Define write, or set View.next_state.")
        return view.next_state, view.losses

    def on_layer_input(self, state: S, x: Tensor) -> Tensor:
        """Return the layer's input x, ``(batch, length, dim)``, before its norm, with what the memory adds to it."""
        return x

    def on_layer_output(self, state: S, outputs: Tensor, segment: Segment) -> S:
        """Update the state that ``write`` returned from the output of the whole layer, if the memory needs it.

        The outputs, ``(batch, length, dim)``, are normalized like the layer's inputs. The segment crosses no end of an
        ``interval``.
        """
        return state

    def extra_repr(self) -> str:
        """Return the constructor's numbers and flags that the memory keeps as attributes, except for dim."""
        names = [name for name in inspect.signature(type(self)).parameters if name != "dim"]
        options = {name: getattr(self, name, None) for name in names}
        return ", ".join(f"{name}={value}" for name, value in options.items() if isinstance(value, int | float))


@runtime_checkable
class ReadoutMemory(Protocol):
    """A memory that answers queries by itself; it stands after an exact memory."""

    def readout(self, view: View, q: Tensor) -> Readout:
        """Answer queries without positions, ``(batch, length, heads, head_dim)``, from the segment's view."""


def project_by_layer(
    memory: Memory[Any], heads: int, x: Tensor, attention: ContentAttention, *projections: str
) -> tuple[Tensor, ...]:
    """Return projections of inputs by the layer of a memory that takes its heads for its own.

    Args:
        memory: Memory with ``heads`` heads.
        heads: Number of heads, which must be the layer's.
        x: Attention inputs, ``(batch, length, dim)``.
        attention: The layer's attention.
        *projections: Names of projections, as in :class:`ContentAttention`.

    Returns:
        One tensor per name, ``(batch, length, dim)``.

    Raises:
        MemtxError: The layer has other heads.
    """
    projected = [attention.project(x, projection, frozen=False) for projection in projections]
    layer_heads, head_dim = projected[0].shape[2:]
    if (layer_heads, head_dim) != (heads, memory.dim // heads):
        message = f"heads is {heads} for a layer with {layer_heads} heads of {head_dim}."
        raise MemtxError(message, f"Give {type(memory).__name__} heads: {layer_heads}, and the layer no head_dim.")
    return tuple(part.flatten(2) for part in projected)
