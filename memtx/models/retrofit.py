"""Memory for a model that is already trained, as one part that a YAML file can name."""

from __future__ import annotations

from collections.abc import Sequence

from memtx.errors import MemtxError
from memtx.models.add_memory import MemoryFactory
from memtx.models.memory_transformer import MemoryTransformer


class Retrofit:
    """Makes a folder's model with memory (see :meth:`MemoryTransformer.with_memory`) for a tokenizer's vocabulary.

    Args:
        path: a published decoder's, one of ours, or a training checkpoint.
        memories: added to the chosen layers.
        window: exact positions seen.
        num_sinks: first tokens of a document that are seen for good.
        layers: which get the memories; None for all.
        gated_memory: whether they enter by gates that begin at 0.
    """

    def __init__(
        self,
        path: str | None = None,
        memories: Sequence[MemoryFactory] = (),
        window: int | None = None,
        num_sinks: int = 4,
        layers: Sequence[int] | None = None,
        gated_memory: bool = True,
    ) -> None:
        self.path = path
        self.memories = memories
        self.window = window
        self.num_sinks = num_sinks
        self.layers = layers
        self.gated_memory = gated_memory

    def __call__(self, vocab_size: int) -> MemoryTransformer:
        """Return the model, ready to be trained.

        Args:
            vocab_size: of the tokenizer that texts are read by, which is to be the folder's own.

        Raises:
            MemtxError: no folder is given, the tokenizer is not the folder's, or the folder's model cannot be read
                or take the memories.
        """
        if self.path is None:
            raise MemtxError(
                "No folder of a model is given to be retrofitted.",
                "Add --model.model.init_args.path FOLDER --data.tokenizer.init_args.path FOLDER/tokenizer.json.",
            )
        model = MemoryTransformer.from_pretrained(self.path)
        if vocab_size > model.vocab_size:
            raise MemtxError(
                f"The tokenizer has {vocab_size} ids, the model in '{self.path}' {model.vocab_size}.",
                "Read texts by the folder's own: --data.tokenizer.init_args.path FOLDER/tokenizer.json.",
            )
        made = model.with_memory(
            self.memories,
            window=self.window,
            num_sinks=self.num_sinks,
            layers=self.layers,
            gated_memory=self.gated_memory,
        )
        return made.train()
