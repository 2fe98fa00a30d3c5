"""Checks of a call's arguments, made before any computation."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.state import MemoryState


def check_token_ids(name: str, token_ids: Tensor, **per_token: Tensor | None) -> None:
    """Raise MemtxError unless token ids are int64 or int32 ``(batch, length)``, length at least 1.

    ``name`` is the name of the argument. Further arguments, by name, must have the same shape; None is skipped.
    """
    if token_ids.dim() != 2 or token_ids.shape[1] == 0 or token_ids.dtype not in (torch.int64, torch.int32):
        raise MemtxError(
            f"{name} is {token_ids.dtype} {tuple(token_ids.shape)}, expected int64 (batch, length), length at least 1.",
            f"Reshape it; for a single text use {name}[None].",
        )
    for other, tensor in per_token.items():
        if tensor is not None and tensor.shape != token_ids.shape:
            raise MemtxError(f"{other} is {tuple(tensor.shape)}, expected {tuple(token_ids.shape)}.", f"Match {name}.")


def check_inputs(tokens: Tensor | None, inputs_embeds: Tensor | None, dim: int) -> tuple[int, int]:
    """Return batch size and length of the input of a call; raises MemtxError unless exactly one is given and fits."""
    if (tokens is None) == (inputs_embeds is None):
        number = "Neither" if tokens is None else "Both"
        raise MemtxError(
            f"{number} of tokens and inputs_embeds {'is' if tokens is None else 'are'} given.", "Give one."
        )
    if tokens is not None:
        check_token_ids("tokens", tokens)
        return tokens.shape[0], tokens.shape[1]
    assert inputs_embeds is not None
    check_vectors("inputs_embeds", inputs_embeds, dim)
    return inputs_embeds.shape[0], inputs_embeds.shape[1]


def check_vectors(name: str, vectors: Tensor, dim: int) -> None:
    """Raise MemtxError unless vectors are floating-point ``(batch, length, dim)``, length at least 1."""
    shape = tuple(vectors.shape)
    if len(shape) != 3 or shape[1] == 0 or shape[2] != dim or not vectors.is_floating_point():
        expected = f"expected floating-point (batch, length, {dim}), length at least 1."
        hint = (
            f"Reshape it; for a single sequence use {name}[None]." if vectors.is_floating_point() else "Use .float()."
        )
        raise MemtxError(f"{name} is {vectors.dtype} {shape}, {expected}", hint)


def check_segment(batch_size: int, length: int, state: MemoryState | None, **per_token: Tensor | None) -> None:
    """Raise MemtxError unless a segment, its state (None for fresh streams) and its per-token arguments fit."""
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != (batch_size, length):
            message = f"{name} is {tuple(tensor.shape)}, expected {(batch_size, length)}."
            raise MemtxError(message, "Match the input.")
    if state is not None and state.batch_size != batch_size:
        message = f"The input has batch size {batch_size}, the state {state.batch_size}."
        raise MemtxError(message, "Select or concatenate streams of the state to match.")


def check_valid_length(batch_size: int, length: int, valid_length: Tensor) -> None:
    """Raise MemtxError unless ``valid_length`` is int64 ``(batch,)``, each within the segment."""
    if valid_length.dtype != torch.int64 or valid_length.shape != (batch_size,):
        raise MemtxError(
            f"valid_length is {valid_length.dtype} {tuple(valid_length.shape)}, expected int64 ({batch_size},).",
            "Give the number of tokens of each stream.",
        )
    # Values on an accelerator are not checked: that would wait for it.
    if valid_length.device.type == "cpu" and not 0 <= valid_length.min() <= valid_length.max() <= length:
        raise MemtxError(f"valid_length is {valid_length.tolist()}.", f"Give numbers from 0 to {length}.")
