"""What a model that reads segment by segment refuses before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from memtx.errors import MemtxError
from memtx.state import MemoryState


def check_inputs(tokens: Tensor, state: MemoryState | None, **per_token: Tensor | None) -> None:
    """Raise unless a segment, the state and what is given beside the tokens fit one another.

    Args:
        tokens: expected int64 (rows, segment).
        state: expected of as many rows; None for fresh streams.
        per_token: by name what is expected of the tokens' shape; None where it is not given.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype not in (torch.int64, torch.int32):
        raise MemtxError(
            f"tokens is {tokens.dtype} {tuple(tokens.shape)}, expected int64 (rows, segment), segment at least 1.",
            "Reshape it; one text alone is tokens[None].",
        )
    if state is not None and state.batch_size != tokens.shape[0]:
        raise MemtxError(
            f"tokens has {tokens.shape[0]} rows, the state {state.batch_size}.",
            "Select or concatenate rows of the state to match.",
        )
    for name, given in per_token.items():
        if given is not None and given.shape != tokens.shape:
            raise MemtxError(f"{name} is {tuple(given.shape)}, expected {tuple(tokens.shape)}.", "Match tokens.")


def check_valid_length(tokens: Tensor, valid_length: Tensor) -> None:
    """Raise unless every row has a length within its segment; ``valid_length`` is expected int64 (rows,)."""
    if valid_length.dtype != torch.int64 or valid_length.shape != tokens.shape[:1]:
        raise MemtxError(
            f"valid_length is {valid_length.dtype} {tuple(valid_length.shape)}, expected int64 ({tokens.shape[0]},).",
            "Say of every row how many tokens it has.",
        )
    # Numbers on an accelerator are not looked at: that would wait for it.
    if valid_length.device.type == "cpu" and not 0 <= valid_length.min() <= valid_length.max() <= tokens.shape[1]:
        raise MemtxError(
            f"valid_length is {valid_length.tolist()}.", f"Give 0 to {tokens.shape[1]}, the segment's tokens."
        )
