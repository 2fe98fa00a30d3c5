"""Where the tokens of one call stand: ticks within the call, positions within their documents.

A *tick* counts tokens of the call and runs on through document starts: the first token given has tick 0,
the newest cached one tick -1. A *position* counts tokens of one document. Everything that decides who
sees whom is a function of positions, shifted to ticks so that it can be compared across a call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.memo import Memo

INFINITE_OFFSET = 1 << 40
"""A tick no stream reaches: "never" for a birth, "not within this call" for an end."""


@dataclass(frozen=True)
class Segment(Memo):
    """The places of one call's tokens.

    Attributes:
        position: (rows, segment) int64, position of each token within its document.
        document_id: (rows, segment) int64, 0 for the document carried in, then 1, 2, ... for those begun here.
        document_end: (rows, segment) int64, the tick at which the token's document ends; INFINITE_OFFSET if it is still
            open.
        past_length: (rows,) int64, tokens of the carried document that were read before this call.
        past_document_end: (rows,) int64, the tick at which the carried document ends; INFINITE_OFFSET if it is still
            open.
        valid_length: (rows,) int64, how many of each row's tokens are of the text; what stands behind them is padding,
            which no token of the text sees and nothing is carried of. None where all are.
    """

    position: Tensor
    document_id: Tensor
    document_end: Tensor
    past_length: Tensor
    past_document_end: Tensor
    valid_length: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the call."""
        return self.position.shape[1]

    @property
    def next_position(self) -> Tensor:
        """(rows,) int64: the position that the next token will have if no document begins there."""
        if self.valid_length is None:
            return self.position[:, -1] + 1
        last = self.position.gather(1, (self.valid_length - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(self.valid_length > 0, last + 1, self.past_length)

    @property
    def last_document_id(self) -> Tensor:
        """(rows, 1) int64: the document of each row's last token."""
        if self.valid_length is None:
            return self.document_id[:, -1:]
        last = self.document_id.gather(1, (self.valid_length - 1).clamp(min=0)[:, None])
        return torch.where(self.valid_length[:, None] > 0, last, 0)

    @classmethod
    def from_document_starts(
        cls, past_length: Tensor, length: int, document_starts: Tensor | None = None, valid_length: Tensor | None = None
    ) -> Segment:
        """Place ``length`` tokens after ``past_length`` ones.

        Args:
            past_length: (rows,) int64, tokens of each row's document read so far.
            length: tokens in the call, at least 1.
            document_starts: (rows, segment) bool, where a document begins; None for nowhere.
            valid_length: (rows,) int64 from 0 to ``length``, tokens of each row before its padding; None for all.

        Raises:
            MemtxError: no token is given, or ``document_starts`` is not of this shape and type.
        """
        if length < 1:
            raise MemtxError(f"A segment of {length} tokens was given.", "Give at least 1.")
        tick = torch.arange(length, device=past_length.device)
        if document_starts is None:
            open_end = torch.full_like(past_length, INFINITE_OFFSET)
            position = past_length[:, None] + tick
            end = open_end[:, None].expand_as(position)
            return cls(position, torch.zeros_like(position), end, past_length, open_end, valid_length)
        if document_starts.dtype != torch.bool or document_starts.shape != (past_length.shape[0], length):
            raise MemtxError(
                f"document_starts is {document_starts.dtype} {tuple(document_starts.shape)}, "
                f"expected bool ({past_length.shape[0]}, {length}).",
                "Mark with True the tokens that begin a document.",
            )
        document = document_starts.cumsum(1)
        begun = torch.where(document_starts, tick, -1).cummax(1).values
        position = torch.where(document > 0, tick - begun, past_length[:, None] + tick)
        # The next start at or after each tick; a document ends where the start after it stands.
        following = torch.where(document_starts, tick, INFINITE_OFFSET).flip(1).cummin(1).values.flip(1)
        end = torch.cat([following[:, 1:], torch.full_like(following[:, :1], INFINITE_OFFSET)], dim=1)
        return cls(position, document, end, past_length, following[:, 0], valid_length)

    def split_offsets(self, interval: int) -> list[int]:
        """Return the ticks at which some row's interval has just ended, in order, the call's end the last.

        Args:
            interval: tokens of a document, counted from its beginning.
        """
        ended = ((self.position + 1) % interval == 0).any(0)
        ticks: list[int] = (ended.nonzero().flatten() + 1).tolist()
        return ticks if ticks and ticks[-1] == self.length else [*ticks, self.length]
