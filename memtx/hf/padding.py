"""Padding and documents of a batch as ``transformers`` describes them, in the terms of the models.

Padding on the left is read as a document of its own, which the text behind it does not see. Padding on the right ends a
stream before the batch does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.hf.exported import depends_on_segmentation
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.validation import check_token_ids, check_vectors
from memtx.state import MemoryState


@dataclass(frozen=True)
class PaddedBatch:
    """Ids or vectors with their documents and padding.

    Attributes:
        inputs: ``(batch, length)`` int64 or ``(batch, length, dim)``, 0 where there is padding.
        document_starts: ``(batch, length)`` bool; None if no document starts.
        valid_length: ``(batch,)`` int64, number of ids before the padding on the right; None without such padding.
    """

    inputs: Tensor
    document_starts: Tensor | None = None
    valid_length: Tensor | None = None

    def slice(self, start: int, end: int, *, carries_state: bool) -> dict[str, Any]:
        """Return the arguments of the model for a segment; ``valid_length`` is needed only if the state is carried."""
        document_starts, valid_length = self.document_starts, self.valid_length if carries_state else None
        return {
            "tokens" if self.inputs.dim() == 2 else "inputs_embeds": self.inputs[:, start:end],
            "document_starts": None if document_starts is None else document_starts[:, start:end],
            "valid_length": None if valid_length is None else (valid_length - start).clamp(0, end - start),
        }


def read_masks(
    model: MemoryTransformer,
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    state: MemoryState | None,
    num_cached: int,
    is_continued: bool,
) -> PaddedBatch:
    """Return a batch from the arguments of a model of ``transformers``.

    Args:
        model: Model that is to read it.
        inputs: Ids, ``(batch, length)`` int64, or vectors, ``(batch, length, dim)``.
        attention_mask: ``(batch, length)`` or ``(batch, num_cached + length)``, 0 for padding; None without padding.
        position_ids: ``(batch, length)`` or ``(1, length)``; None for consecutive ones.
        state: State of the streams; None for fresh streams.
        num_cached: Number of ids that the state has read since the columns of the mask begin.
        is_continued: If True, the state had read others before.

    Raises:
        MemtxError: The arguments do not fit each other, or describe something that the model cannot read.
    """
    if inputs.dim() == 2:
        check_token_ids("input_ids", inputs)
    else:
        check_vectors("inputs_embeds", inputs, model.dim)
    batch_size, length = inputs.shape[:2]
    document_starts = torch.zeros(batch_size, length, dtype=torch.bool, device=inputs.device)
    begun = torch.full((batch_size,), is_continued or num_cached > 0, device=inputs.device)
    valid_length = None
    mask = None if attention_mask is None else _check_mask(attention_mask, inputs, num_cached)
    if mask is not None and not mask.all():
        if mask.shape[1] > length and not is_continued:
            begun = mask[:, :num_cached].any(1)
        mask = mask[:, -length:]
        document_starts, valid_length = _read_padding(mask, begun, is_first=num_cached == 0)
        if document_starts.any() and depends_on_segmentation(model):
            message = "attention_mask has padding on the left, but the model's results depend on its segments."
            raise MemtxError(message, "Read texts of one length together, or one at a time.")
        inputs = inputs.masked_fill(~mask if inputs.dim() == 2 else ~mask[..., None], 0)
    else:
        mask = None
    if position_ids is not None:
        positions = position_ids.to(inputs.device).expand(batch_size, -1)
        document_starts = document_starts | _read_positions(positions, inputs.shape[:2], mask, begun, state)
    if inputs.dim() == 2 and inputs.device.type == "cpu" and int(inputs.max()) >= model.vocab_size:
        message = f"input_ids has {int(inputs.max())}, but the model has {model.vocab_size} tokens."
        raise MemtxError(message, "Use the tokenizer of the folder, and its attention_mask for padding.")
    return PaddedBatch(inputs, document_starts if document_starts.any() else None, valid_length)


def _check_mask(attention_mask: Tensor, inputs: Tensor, num_cached: int) -> Tensor:
    """Return the mask as bool; raises MemtxError if it has another shape."""
    batch_size, length = inputs.shape[:2]
    if attention_mask.shape not in ((batch_size, length), (batch_size, num_cached + length)):
        message = f"attention_mask is {tuple(attention_mask.shape)}, expected ({batch_size}, {num_cached + length})."
        raise MemtxError(message, "Give a column for every id, padding included.")
    return attention_mask.to(inputs.device) != 0


def _read_padding(mask: Tensor, begun: Tensor, *, is_first: bool) -> tuple[Tensor, Tensor | None]:
    """Return the document starts behind padding on the left, and the valid length if there is padding on the right."""
    # (batch, length): the first id behind padding.
    rises = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    has_gap = (rises.sum(1) > 1) | (begun & mask.any(1) & ~mask[:, 0])
    if has_gap.any():
        row = int(has_gap.nonzero()[0])
        message = f"attention_mask has padding between the ids of text {row}."
        raise MemtxError(message, "Put padding before or behind each text.")
    document_starts = rises & ~begun[:, None]
    if is_first:
        document_starts[:, 0] = False  # a fresh stream begins by itself
    indices = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends = (mask * indices).amax(1)
    # A text that has not begun yet has no end: what is read of it is padding on the left.
    ends = torch.where(mask.any(1) | begun, ends, mask.shape[1])
    return document_starts, ends if bool((ends < mask.shape[1]).any()) else None


def _read_positions(
    positions: Tensor, shape: torch.Size, mask: Tensor | None, begun: Tensor, state: MemoryState | None
) -> Tensor:
    """Return the document starts at position 0; raises MemtxError if positions skip or begin elsewhere."""
    if positions.shape != shape:
        message = f"position_ids is {tuple(positions.shape)}, expected {tuple(shape)}."
        raise MemtxError(message, "Match input_ids.")
    is_text = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
    before = torch.nn.functional.pad(is_text[:, :-1], (1, 0))
    # The position that follows the previous id, or the state.
    follows = torch.nn.functional.pad(positions[:, :-1] + 1, (1, 0))
    if state is not None:
        follows[:, 0] = torch.where(begun, state.position, 0)
        before[:, 0] = begun
    expected = torch.where(before, follows, 0)
    document_starts = is_text & (positions == 0) & before
    if bool((is_text & (positions != expected) & (positions != 0)).any()):
        message = "position_ids do not count up by 1 from 0, or from the state's position."
        raise MemtxError(message, "Remove them, or give 0 where a document begins.")
    return document_starts
