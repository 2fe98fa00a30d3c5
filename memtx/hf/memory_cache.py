"""The state of streams as a ``Cache`` of ``transformers``, of constant size; importing this needs ``transformers``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from memtx.errors import MemtxError
from memtx.inference.decoder import Decoder
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState


class MemoryCache(Cache):  # type: ignore[misc]
    """State of a batch of streams in the form that ``generate`` carries; the models replace ``state`` as they read.

    Single tokens are read by a :class:`~memtx.inference.decoder.Decoder`, which holds keys and values of the window.

    Attributes:
        num_tokens: Number of ids, with padding, read since the cache was created.
        is_continued: If True, the streams were not fresh when the cache was created.

    Args:
        state: State of the streams. None for fresh ones.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, state: MemoryState | None = None) -> None:
        super().__init__(layers=[])
        self._state = state
        self._decoder: Decoder | None = None
        self.num_tokens = 0
        self.is_continued = state is not None

    @property
    def state(self) -> MemoryState | None:
        """State of the streams, as a value; None for fresh ones."""
        # Cloned, because the decoder's tensors cannot take part in a backward pass.
        return self._state if self._decoder is None else self._decoder.state.map(torch.clone)

    @state.setter
    def state(self, value: MemoryState | None) -> None:
        self._state, self._decoder = value, None

    def step(self, model: MemoryTransformer, tokens: Tensor) -> Tensor:
        """Read one token per stream, ``(batch,)`` int64, by a model in eval mode; return logits ``(batch, vocab)``."""
        if self._decoder is None or self._decoder.model is not model:
            state = self.state
            self._decoder = Decoder(
                model, model.init_state(len(tokens)) if state is None else state, use_cuda_graph=False
            )
            self._state = None
        self.num_tokens += 1
        return self._decoder.step(tokens).clone()

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, with the state as a value: a copy has no decoder, and so no model."""
        return {**vars(self), "_state": self.state, "_decoder": None}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens, with padding, read since the cache was created."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: a stream has no maximum length."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes, which does not depend on the number of tokens read."""
        return 0 if (state := self.state) is None else state.nbytes

    @property
    def batch_size(self) -> int:
        """Number of streams; -1 before the first token."""
        if self._decoder is not None:
            return self._decoder.batch_size
        return -1 if self._state is None else self._state.batch_size

    @property
    def is_initialized(self) -> bool:
        """True after the first token."""
        return self._state is not None or self._decoder is not None

    @property
    def is_linear(self) -> list[bool]:
        """``[False]``, so that ``generate`` leaves out the ids that the cache has read."""
        return [False]

    def continued(self) -> MemoryCache:
        """Return a cache of the same streams for ``generate(new_ids, cache=...)``, given only the ids that follow.

        With the cache itself ``generate`` expects the ids of the whole text, as ``transformers`` does.
        """
        return MemoryCache(self.state)

    def reset(self) -> None:
        """Make all streams fresh."""
        self.state, self.num_tokens, self.is_continued = None, 0, False

    def detach(self) -> None:
        """Detach the state from the graph, as truncated back-propagation through time does between steps."""
        self.state = None if (state := self.state) is None else state.detach()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select streams, as beam search does."""
        if self._decoder is not None and self._decoder.batch_size == len(beam_idx):
            self._decoder.reorder(beam_idx)
        else:
            self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select streams by index."""
        if (state := self.state) is not None:
            self.state = state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream."""
        if (state := self.state) is not None:
            self.state = state.select(torch.arange(state.batch_size).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        """Raise MemtxError: a state cannot forget its newest tokens."""
        raise MemtxError(
            "A memory state cannot be cropped.", "Copy the cache before reading on; do without assisted generation."
        )

    def activate_past_recording(self) -> None:
        """Raise MemtxError, as :meth:`crop` does."""
        self.crop()

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Raise MemtxError: layers of ``transformers`` cannot write into the state."""
        raise MemtxError("A MemoryCache holds no keys and values.", "Pass it to a model of memtx only.")

    def __repr__(self) -> str:
        return f"MemoryCache(batch_size={self.batch_size}, num_tokens={self.num_tokens}, nbytes={self.nbytes})"


def check_cache(cache: object) -> MemoryCache | None:
    """Return a cache that a caller gave, None for none; raises MemtxError for one of another kind."""
    if isinstance(cache, MemoryState):
        return MemoryCache(cache)
    if cache is not None and not isinstance(cache, MemoryCache):
        message = f"The cache is a {type(cache).__name__}, but this model carries a state."
        raise MemtxError(message, "Give a memtx.hf.memory_cache.MemoryCache, or none.")
    return cache
