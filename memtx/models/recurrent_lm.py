"""Interfaces of a model and a language model that reads a stream segment by segment, and the output of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memtx.memory.base import Losses
from memtx.state import MemoryState


@dataclass(frozen=True)
class MemoryOutput:
    """Output of one call.

    Attributes:
        logits: ``(batch, length, vocab)``; None if labels were given, so that the logits are never stored. Of a
            ``SequenceModel``, the output of its head.
        hidden_states: If requested, outputs of the embedding and of every layer, each ``(batch, length, dim)``.
        state: State for the next call.
        loss: With labels, ``language_loss`` plus the auxiliary losses: the value to call ``backward`` on.
        language_loss: With labels, mean negative log-likelihood of the scored labels in nats; 0 if there are none.
        nll: With labels, negative log-likelihood of each label in nats, ``(batch, length)`` float32 (float64 in a
            float64 model), 0 where a label is ignored; for metrics, without gradient.
        aux_losses: Auxiliary losses of the memories by name, weighted and averaged over layers; empty in eval mode.
    """

    logits: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    state: MemoryState
    loss: Tensor | None
    language_loss: Tensor | None
    nll: Tensor | None
    aux_losses: Losses


class RecurrentModel(Protocol):
    """A causal model that carries a state of fixed size from one segment to the next."""

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


class RecurrentLanguageModel(RecurrentModel, Protocol):
    """A recurrent model of tokens."""

    vocab_size: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights; a state belongs to the model of equal fingerprint."""
        ...
