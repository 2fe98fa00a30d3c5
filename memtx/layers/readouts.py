"""Attention's outputs and what memories answered by themselves, made one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from memtx.memory.base import Readout
from memtx.ops.attention.merge import merge


def joined(attended: Tensor, lse: Tensor | None, readouts: Sequence[Readout]) -> Tensor:
    """Return attention's outputs with all answers in them.

    First those that bring a log-sum-exp, in one softmax with attention and so in no order; then, in their order,
    those that take a share or are added.

    Args:
        attended: (rows, heads, segment, head_dim).
        lse: (rows, heads, segment), attention's; needed where an answer brings one.
        readouts: the answers.
    """
    parts = [(one.out.to(attended.dtype), one.lse) for one in readouts if one.lse is not None]
    if parts:
        assert lse is not None
        attended, _ = merge([(attended, lse), *parts])
    for one in readouts:
        if one.gate is not None:
            attended = attended + (one.gate * (one.out - attended)).to(attended.dtype)
        elif one.lse is None:
            attended = attended + one.out.to(attended.dtype)
    return attended
