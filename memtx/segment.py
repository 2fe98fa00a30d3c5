"""Positions of the tokens of one call.

An *offset* counts the tokens of the call across document starts: the first token has offset 0, the newest cached token
-1. A *position* counts the tokens of one document. Visibility is a function of positions, shifted to
offsets so that all tokens of a call can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memo import Memo

INFINITE_OFFSET = 1 << 40
"""An offset that no stream reaches: "never" as a start, "not in this call" as an end."""


@dataclass(frozen=True)
class Segment(Memo):
    """Positions and documents of one call's tokens.

    Attributes:
        position: ``(batch, length)`` int64, position of each token within its document.
        document_id: ``(batch, length)`` int64, 0 for the document that was open before the call, then 1, 2, ...
        document_end: ``(batch, length)`` int64, offset at which the token's document ends; INFINITE_OFFSET while open.
        past_length: ``(batch,)`` int64, number of tokens of the open document read before the call.
        past_document_end: ``(batch,)`` int64, offset at which that document ends; INFINITE_OFFSET if it is still open.
        valid_length: ``(batch,)`` int64, number of tokens before the padding, which is neither visible nor carried
            over. None if there is no padding.
        has_document_starts: False if no document can start in the call, known without looking at values.
    """

    position: Tensor
    document_id: Tensor
    document_end: Tensor
    past_length: Tensor
    past_document_end: Tensor
    valid_length: Tensor | None = None
    has_document_starts: bool = True

    @property
    def length(self) -> int:
        """Number of tokens in the call."""
        return self.position.shape[1]

    @property
    def next_position(self) -> Tensor:
        """``(batch,)`` int64, position of the next token unless it starts a document."""
        if self.valid_length is None:
            return self.position[:, -1] + 1
        last = self.position.gather(1, (self.valid_length - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(self.valid_length > 0, last + 1, self.past_length)

    @property
    def last_document_id(self) -> Tensor:
        """``(batch, 1)`` int64, document of the last token."""
        if self.valid_length is None:
            return self.document_id[:, -1:]
        last = self.document_id.gather(1, (self.valid_length - 1).clamp(min=0)[:, None])
        return torch.where(self.valid_length[:, None] > 0, last, 0)

    @classmethod
    def from_document_starts(
        cls, past_length: Tensor, length: int, document_starts: Tensor | None = None, valid_length: Tensor | None = None
    ) -> Segment:
        """Compute the positions of ``length`` tokens that follow ``past_length`` earlier ones.

        Raises MemtxError if ``length`` is 0, or ``document_starts`` has another shape or dtype.

        Args:
            past_length: ``(batch,)`` int64, number of tokens read so far in each open document.
            length: Number of tokens in the call, at least 1.
            document_starts: ``(batch, length)`` bool, True for the first token of a document; None for no such token.
            valid_length: ``(batch,)`` int64 from 0 to ``length``, tokens before the padding; None for no padding.
        """
        if length < 1:
            raise MemtxError(f"The segment has {length} tokens.", "Pass at least 1.")
        offset = torch.arange(length, device=past_length.device)
        if document_starts is None:
            open_end = torch.full_like(past_length, INFINITE_OFFSET)
            position = past_length[:, None] + offset
            document_end = open_end[:, None].expand_as(position)
            document_id = torch.zeros_like(position)
            return cls(position, document_id, document_end, past_length, open_end, valid_length, False)
        if document_starts.dtype != torch.bool or document_starts.shape != (past_length.shape[0], length):
            expected = f"expected bool ({past_length.shape[0]}, {length})."
            message = f"document_starts is {document_starts.dtype} {tuple(document_starts.shape)}, {expected}"
            raise MemtxError(message, "Mark the first token of each document with True.")
        document_id = document_starts.cumsum(1)
        start = torch.where(document_starts, offset, -1).cummax(1).values
        position = torch.where(document_id > 0, offset - start, past_length[:, None] + offset)
        # The first start at or after each offset; a token's document ends at the first start after the token.
        next_start = torch.where(document_starts, offset, INFINITE_OFFSET).flip(1).cummin(1).values.flip(1)
        document_end = torch.cat([next_start[:, 1:], torch.full_like(next_start[:, :1], INFINITE_OFFSET)], dim=1)
        return cls(position, document_id, document_end, past_length, next_start[:, 0], valid_length)

    def split_offsets(self, interval: int) -> list[int]:
        """Return the offsets at which an interval ends in any batch entry, in ascending order, and finally the length.

        An interval consists of ``interval`` tokens, counted from the start of each document.
        """
        if self.length == 1:  # known without looking at values
            return [1]
        is_end = ((self.position + 1) % interval == 0).any(0)
        offsets: list[int] = (is_end.nonzero().flatten() + 1).tolist()
        return offsets if offsets and offsets[-1] == self.length else [*offsets, self.length]
