"""Protocol of a language model that reads a stream segment by segment."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memtx.models.memory_transformer import MemoryOutput
from memtx.state import MemoryState


class RecurrentLanguageModel(Protocol):
    """A causal language model that carries a state of fixed size from one segment to the next.

    Attributes:
        vocab_size: Number of token ids.
    """

    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights; a state belongs to the model of equal fingerprint."""
        ...

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> MemoryState:
        """Return the state of ``batch_size`` fresh streams; dtype and device default to the weights'."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        state: MemoryState,
        *,
        document_starts: Tensor | None = None,
        labels: Tensor | None = None,
        return_hidden_states: bool = False,
    ) -> MemoryOutput:
        """Read one segment, as :meth:`memtx.MemoryTransformer.forward` does."""
        ...
