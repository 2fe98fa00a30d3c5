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


def check_segment(tokens: Tensor, state: MemoryState | None, **per_token: Tensor | None) -> None:
    """Raise MemtxError unless a segment, its state (None for fresh streams) and its per-token arguments fit."""
    check_token_ids("tokens", tokens, **per_token)
    if state is not None and state.batch_size != tokens.shape[0]:
        message = f"tokens has batch size {tokens.shape[0]}, the state {state.batch_size}."
        raise MemtxError(message, "Select or concatenate streams of the state to match.")


def check_valid_length(tokens: Tensor, valid_length: Tensor) -> None:
    """Raise MemtxError unless ``valid_length`` is int64 ``(batch,)``, each within the segment."""
    if valid_length.dtype != torch.int64 or valid_length.shape != tokens.shape[:1]:
        raise MemtxError(
            f"valid_length is {valid_length.dtype} {tuple(valid_length.shape)}, expected int64 ({tokens.shape[0]},).",
            "Give the number of tokens of each stream.",
        )
    # Values on an accelerator are not checked: that would wait for it.
    if valid_length.device.type == "cpu" and not 0 <= valid_length.min() <= valid_length.max() <= tokens.shape[1]:
        raise MemtxError(f"valid_length is {valid_length.tolist()}.", f"Give numbers from 0 to {tokens.shape[1]}.")
