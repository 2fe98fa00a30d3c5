"""Memory for a model that is already trained, as one part that a YAML file can name."""

from __future__ import annotations

from collections.abc import Sequence

from memtx.errors import MemtxError
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.mounting import MakeMemory


class Retrofit:
    """Makes a folder's model with memory (see :meth:`MemoryTransformer.with_memory`) for a tokenizer's vocabulary.

    Args:
        folder: a published decoder's, one of ours, or a training checkpoint.
        memories: added to the chosen layers.
        window: exact positions seen.
        sinks: first tokens of a document that are seen for good.
        layers: which get the memories; None for all.
        gated: whether they enter by gates that begin at 0.
    """

    def __init__(
        self,
        folder: str | None = None,
        memories: Sequence[MakeMemory] = (),
        window: int | None = None,
        sinks: int = 4,
        layers: Sequence[int] | None = None,
        gated: bool = True,
    ) -> None:
        self.folder = folder
        self.memories = memories
        self.window = window
        self.sinks = sinks
        self.layers = layers
        self.gated = gated

    def __call__(self, vocab_size: int) -> MemoryTransformer:
        """Return the model, ready to be trained.

        Args:
            vocab_size: of the tokenizer that texts are read by, which is to be the folder's own.

        Raises:
            MemtxError: no folder is given, the tokenizer is not the folder's, or the folder's model cannot be read
                or take the memories.
        """
        if self.folder is None:
            raise MemtxError(
                "No folder of a model is given to be retrofitted.",
                "Add --model.model.init_args.folder FOLDER --data.tokenizer.init_args.path FOLDER/tokenizer.json.",
            )
        model = MemoryTransformer.from_pretrained(self.folder)
        if vocab_size > model.vocab_size:
            raise MemtxError(
                f"The tokenizer has {vocab_size} ids, the model in '{self.folder}' {model.vocab_size}.",
                "Read texts by the folder's own: --data.tokenizer.init_args.path FOLDER/tokenizer.json.",
            )
        made = model.with_memory(
            self.memories, window=self.window, sinks=self.sinks, layers=self.layers, gated=self.gated
        )
        return made.train()
