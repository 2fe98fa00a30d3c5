"""What a loader hands out: tokens, what to predict, where documents begin, and how much raw text that is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a place that is not scored; torch's own default for cross entropy."""


class Batch(NamedTuple):
    """Rows of text that go on where the previous batch of the same stream ended.

    A plain tuple type, because Lightning moves its tensors to the device and refuses frozen dataclasses here.

    Attributes:
        tokens: (batch, length) int64.
        labels: (batch, length) int64, the token that follows, also across the batch's end; ``IGNORE_INDEX`` where the
            next one begins another document or nothing follows. The begin token is never a label.
        document_starts: (batch, length) bool, True where a token begins a document.
        num_words: (batch,) int64, whitespace-separated words of raw text that the stream's scored labels cover. A
            document's words are spread evenly over its text tokens and rounded down cumulatively, so that sums over
            a whole document are exact.
        num_bytes: (batch,) int64, UTF-8 bytes of raw text, in the same way.
    """

    tokens: Tensor
    labels: Tensor
    document_starts: Tensor
    num_words: Tensor
    num_bytes: Tensor
