"""A decoder that writes what follows a text: every row is read from a fresh memory, whatever its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memtx.data.batch import Batch
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState
from memtx.training.language import LanguageModule


class SummaryModule(LanguageModule):
    """Trains a memory transformer on texts and their summaries; see LanguageModule for its arguments.

    ``val_bits_per_byte`` and ``val_word_perplexity`` are of summaries alone.
    """

    def _get_state(self, stage: str, batch: Batch, model: MemoryTransformer | None = None) -> MemoryState:
        return (self.model if model is None else model).init_state(batch.tokens.shape[0])

    def rank_state(self) -> dict[str, Any]:
        """Return nothing: no memory outlives a batch."""
        return {}

    def restore_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Take nothing."""
