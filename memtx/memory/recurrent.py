"""The recurrent cache of Transformer-XL (Dai et al. 2019, section 3.2): the newest layer inputs, kept exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memtx.errors import MemtxError, check_at_least
from memtx.memory.base import ContentAttention, EntryPositions, Memory, View
from memtx.memory.kv_ring import RingLayout
from memtx.memory.parts import gather_entries
from memtx.ops.attention.mask import BankSplit, DilatedWindow, KeyRange, Visibility
from memtx.segment import INFINITE_OFFSET, Segment
from memtx.state import state_dataclass


@state_dataclass
class RecurrentState:
    """The newest layer inputs of the open document, newest last, ``(batch, cache_length, dim)``."""

    hidden: Tensor


class RecurrentMemory(Memory[RecurrentState]):
    """A cache through which every position sees itself and the ``window - 1`` positions before it.

    Args:
        dim: Width of the hidden states.
        window: Number of exact positions visible.
        same_length: If True, every query sees equally many positions, so that results do not depend on segmentation;
            Transformer-XL is evaluated this way. If False, the whole cache is visible to the whole call, as
            Transformer-XL is trained, and results depend on the lengths of the calls.
        trained_length: Length of the texts that the layer was trained on with full attention; the window alone lets go
            of their first tokens (see :func:`memtx.models.add_memory.add_memory`). None if it was trained with a window
            that slides.
        near_window: Positions of the window that count as exact; those beyond are a source of their own, "cache" (see
            :func:`memtx.models.sources.list_sources`). None counts all.
        entry_bias: Initial value of a log-weight, learned per head, that is added to the scaled scores of positions
            beyond ``near_window``. None disables it.
        dilation: Distance between the positions that a head sees, so that ``window`` of them reach further (Longformer,
            Beltagy et al. 2020, section 3.1): one for all heads, or a list for the last heads, one each, as in ``[2,
            4]``; the heads before these have 1. Decoding keeps all positions that the farthest head reaches.

    Raises:
        MemtxError: A number is not positive (window may be 0 without ``same_length``), ``near_window`` is not below
            ``window`` or given without ``same_length``, ``entry_bias`` without ``near_window``, or a ``dilation`` above
            1 beside ``near_window`` or without ``same_length``.
    """

    supports_padding = True
    unbounded = False

    def __init__(
        self,
        dim: int,
        window: int = 512,
        same_length: bool = True,
        trained_length: int | None = None,
        near_window: int | None = None,
        entry_bias: float | None = None,
        dilation: Sequence[int] | int = 1,
    ) -> None:
        super().__init__(dim)
        check_at_least(1 if same_length else 0, window=window)
        check_at_least(1, trained_length=trained_length or 1)
        if near_window is not None and not (same_length and 1 <= near_window < window):
            message = f"near_window is {near_window}, window {window}, same_length {same_length}."
            raise MemtxError(message, "Give a near_window from 1 to window - 1, with same_length.")
        if entry_bias is not None and near_window is None:
            message = f"entry_bias is {entry_bias}, but no positions lie beyond a near window."
            raise MemtxError(message, "Give near_window, too, or remove entry_bias.")
        distances = (dilation,) if isinstance(dilation, int) else tuple(dilation)
        for distance in distances:
            check_at_least(1, dilation=distance)
        if (is_dilated := max(distances, default=1) > 1) and (near_window is not None or not same_length):
            message = f"dilation is {dilation}, near_window {near_window}, same_length {same_length}."
            raise MemtxError(message, "Give a dilation above 1 with same_length and without near_window.")
        self.dilation, self.supports_relative_positions = dilation, not is_dilated
        self.near_window, self.entry_bias = near_window, entry_bias
        self.has_bank = near_window is not None
        self.trained_length = trained_length
        # A number is that of all heads.
        window_options = {"default_distance": dilation} if isinstance(dilation, int) else {"distances": distances}
        self.dilated = DilatedWindow(window, **window_options) if is_dilated else None  # type: ignore[arg-type]
        self.set_window(window, same_length)

    @property
    def is_resizable(self) -> bool:
        """True if nothing but the cache depends on the window."""
        return self.near_window is None and self.dilated is None

    def set_window(self, window: int, same_length: bool) -> None:
        """Set the exact positions visible; states of another window no longer fit."""
        self.window, self.same_length = window, same_length
        self.depends_on_segmentation = not same_length
        self.cache_length = (self.dilated.length if self.dilated else window) - int(same_length)

    def init_state(self, batch_size: int, *, like: Tensor) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState(like.new_zeros(batch_size, self.cache_length, self.dim))

    def read(self, state: RecurrentState, x: Tensor, segment: Segment, attention: ContentAttention) -> View:
        """Open [cache | segment], without entries that no document has yet."""
        num_cached = min(count_past_tokens(segment), self.cache_length)
        settings = (num_cached, self.window if self.same_length else None, self.near_window, self.dilated)
        entry_positions = segment.memo((RecurrentMemory, *settings), lambda: split_window(segment, *settings))
        cache = state.hidden.to(x.dtype)
        next_state = RecurrentState(update_cache(cache, x, segment))
        return View((cache[:, self.cache_length - num_cached :], x), entry_positions, next_state=next_state)

    def ring_layout(self) -> RingLayout | None:
        """Return one slot per position of the window, or None if visibility depends on segmentation."""
        if not self.same_length:
            return None
        return RingLayout(self.cache_length + 1, 1, 0, self.cache_length, self.near_window, self.dilated)

    def split_state(self, state: RecurrentState) -> tuple[Tensor, Tensor]:
        """Return the cache and an empty bank."""
        return state.hidden, state.hidden[:, :0]

    def join_state(self, cache: Tensor, bank: Tensor) -> RecurrentState:
        """Return the state of a cache."""
        return RecurrentState(cache)

    def compress_block(self, block: Tensor, recent: Tensor, attention: ContentAttention) -> Tensor:
        """Return the only state of each block, uncompressed."""
        return block[:, 0]


def count_past_tokens(segment: Segment) -> int:
    """Return the tokens read so far in the longest open document, or a larger number where reading it would wait.

    A model with a window of 100,000 tokens then projects a short text's entries instead of 100,000 zeros.
    """
    if not _has_known_values(segment.past_length):
        return INFINITE_OFFSET
    num_tokens: int = segment.memo("past tokens", lambda: int(segment.past_length.max()))
    return num_tokens


def _has_known_values(x: Tensor) -> bool:
    """Return True if values can be read without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def _fills_cache(segment: Segment, cache_length: int) -> bool:
    """Return True if every open document is known to have at least ``cache_length`` tokens after the segment."""
    position = segment.next_position
    if not _has_known_values(position):
        return False
    shortest: int = segment.memo("shortest document", lambda: int(position.min()))
    return shortest >= cache_length


def locate_entries(segment: Segment, cache_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the offsets, positions (negative where nothing is cached) and document ends of [cache | segment].

    All are ``(batch, cache_length + length)`` int64.
    """
    batch_size = segment.position.shape[0]
    offset = torch.arange(-cache_length, segment.length, device=segment.position.device).expand(batch_size, -1)
    position = torch.cat([segment.past_length[:, None] + offset[:, :cache_length], segment.position], dim=1)
    past_end = segment.past_document_end[:, None].expand(-1, cache_length)
    return offset, position, torch.cat([past_end, segment.document_end], dim=1)


def sliding_window(segment: Segment, cache_length: int, window: int | None, min_age: int = 0) -> EntryPositions:
    """Return the positions of [cache | segment], visible to the document's later tokens while young enough.

    Args:
        segment: Positions of the call's tokens.
        cache_length: Length of the cache.
        window: Number of tokens that see each entry. None means all from ``min_age`` on.
        min_age: Age in tokens from which an entry is visible; a token itself has age 0.
    """
    offset, position, visible_until = locate_entries(segment, cache_length)
    if window is not None:
        visible_until = torch.minimum(offset + (min_age + window), visible_until)
    visible_until = torch.where(position >= 0, visible_until, -INFINITE_OFFSET)
    key_range = KeyRange(offset.shape[1], min_age - cache_length, 1, window)
    visibility = Visibility(offset + min_age, visible_until, segment.length, (key_range,))
    return EntryPositions(offset[:1].double(), visibility)


def split_window(
    segment: Segment, cache_length: int, window: int | None, near_window: int | None, dilated: DilatedWindow | None
) -> EntryPositions:
    """Return the positions of [cache | segment] in a window, split where ``near_window`` ends if it is given."""
    if dilated is not None:
        positions = sliding_window(segment, cache_length, dilated.length)
        return replace(positions, visibility=replace(positions.visibility, dilated=dilated, _values={}))
    positions = sliding_window(segment, cache_length, window)
    if near_window is None or window is None:
        return positions
    near = sliding_window(segment, cache_length, near_window).visibility
    far = sliding_window(segment, cache_length, window - near_window, min_age=near_window).visibility
    return replace(positions, bank_split=BankSplit(far, near))


def update_cache(cache: Tensor, x: Tensor, segment: Segment) -> Tensor:
    """Return the next cache: the newest entries of [cache | segment], with zeros in place of other documents' entries.

    Cached entries are ``(batch, cache_length, dim)``, those of the segment, x, ``(batch, length, dim)``.
    """
    cache_length, length = cache.shape[1], x.shape[1]

    def other_document() -> Tensor:
        # The newest document has next_position tokens so far; they are the last ones.
        age = torch.arange(cache_length, 0, -1, device=x.device)
        return (age > segment.next_position[:, None])[..., None]

    if segment.valid_length is not None:
        index = segment.valid_length[:, None] + torch.arange(cache_length, device=x.device)
        newest = gather_entries(torch.cat([cache, x], dim=1), index)
    elif length >= cache_length:
        newest = x[:, length - cache_length :]
    else:
        newest = torch.cat([cache[:, length:], x], dim=1)
        if _fills_cache(segment, cache_length):
            return newest
    return newest.masked_fill(segment.memo(("other document", cache_length), other_document), 0.0)
