"""Chunks of tokens that a layer maps independently or in order, so that its activations stay in the CPU cache."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CHUNK_TOKENS = 1024
"""Tokens of all streams per chunk."""

MIN_CHUNK_LENGTH = 128
"""Minimum tokens per stream of a chunk."""


def split_without_grad(x: Tensor) -> tuple[Tensor, ...]:
    """Split ``(batch, length, dim)`` into chunks of tokens on the CPU without gradient, else return it alone."""
    chunk_length = max(MAX_CHUNK_TOKENS // x.shape[0], MIN_CHUNK_LENGTH)
    if x.device.type != "cpu" or x.shape[1] <= chunk_length or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (x,)
    return torch.split(x, chunk_length, dim=1)
