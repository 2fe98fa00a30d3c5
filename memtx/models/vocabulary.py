"""Change of a model's vocabulary, for tokens that were added to its tokenizer."""

from __future__ import annotations

import copy
from typing import cast

import torch

from memtx import class_config
from memtx.models.memory_transformer import MemoryTransformer


def resize_vocabulary(model: MemoryTransformer, vocab_size: int) -> MemoryTransformer:
    """Return a model with the weights of another, and more or fewer tokens.

    Weights of new tokens are the mean of the others, so that the first predictions are not theirs (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
        model: Model whose weights are copied.
        vocab_size: Number of tokens.
    """
    config = copy.deepcopy(model.config)
    config["init_args"]["vocab_size"] = vocab_size
    resized = cast(MemoryTransformer, class_config.from_config(config)())
    resized.to(next(model.parameters()))
    sources = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*resized.named_parameters(), *resized.named_buffers()]:
            source = sources[name]
            if tensor.shape == source.shape:
                tensor.copy_(source)
            else:
                tensor[: len(source)] = source[: len(tensor)]
                tensor[len(source) :] = source.mean(0)
            tensor.requires_grad_(source.requires_grad)
    return resized.train(model.training)
