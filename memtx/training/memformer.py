"""Training of a Memformer on streams of documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from memtx.errors import MemtxError
from memtx.models.memformer import Memformer
from memtx.training.language import LanguageModule


class MemformerModule(LanguageModule):
    """Trains a Memformer by memory replay back-propagation (Wu et al. 2020, section 3.5).

    A batch holds ``bptt_segments`` segments, the length of back-propagation; the slots that a segment writes are read
    when the next but one is predicted, so they learn from three segments on.

    Args:
        model: Creates the model from the vocabulary size.
        vocab_size: Vocabulary size; set from the data module.
        segment_length: Tokens per call, at most the model's; set from the data module.
        replay: If True, recompute each segment in the backward pass and store only the states between segments.
        **options: Options of :class:`memtx.training.language.LanguageModule` but ``measure_memory_gain``.

    Raises:
        MemtxError: The data's segments are longer than the model's.
    """

    def __init__(
        self,
        model: Callable[[int], Memformer] = Memformer,
        vocab_size: int = 257,
        segment_length: int = 512,
        *,
        replay: bool = True,
        **options: Any,
    ) -> None:
        options["measure_memory_gain"] = False  # which compares sources of a memory transformer
        super().__init__(model, vocab_size, segment_length, replay=replay, **options)  # type: ignore[arg-type]
        max_length = cast(Memformer, self.model).segment_length
        if segment_length > max_length:
            message = f"data.segment_length ({segment_length}) exceeds the model's ({max_length})."
            raise MemtxError(message, "Set both to the same number.")
