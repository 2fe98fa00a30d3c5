"""Attention's outputs and what memories answered by themselves, made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memtx.memory.base import Readout
from memtx.ops.attention.reference import merge_attention


def combine_readouts(attended: Tensor, lse: Tensor | None, readouts: Sequence[Readout]) -> Tensor:
    """Return attention's outputs with all answers in them.

    First those that bring a log-sum-exp alone, in one softmax with attention and so in no order; then, in their
    order, those that take a share or are added.

    Args:
        attended: (rows, heads, segment, head_dim).
        lse: (rows, heads, segment), attention's; needed where an answer brings one.
        readouts: the answers.
    """
    parts = [(one.out.to(attended.dtype), one.lse) for one in readouts if one.lse is not None and one.gate is None]
    if parts:
        assert lse is not None
        attended, lse = merge_attention([(attended, lse), *parts])
    for one in readouts:
        if one.gate is not None:
            share = one.gate
            if one.lse is not None:
                assert lse is not None
                share = share * torch.sigmoid(one.lse - lse)[..., None]
            attended = attended + (share * (one.out - attended)).to(attended.dtype)
        elif one.lse is None:
            attended = attended + one.out.to(attended.dtype)
    return attended


def apply_gate(readout: Readout, gate: Tensor) -> Readout:
    """Return an answer that a gate lets through in part: at 0 the layer gives what it gives without.

    A learned gate a head that begins at 0, as in Flamingo (Alayrac et al. 2022, section 2.2): the answer itself has
    then no gradient, but the gate has, so both learn from the second step on. What stands in one softmax with the
    attention is let through in proportion to its share there, so that a gate of 1 is that softmax.

    Args:
        readout: what a memory answered.
        gate: (heads,), from -1 to 1.
    """
    gate = gate[:, None, None]
    if readout.gate is None and readout.lse is None:
        return replace(readout, out=readout.out * gate.to(readout.out.dtype))
    return replace(readout, gate=gate if readout.gate is None else readout.gate * gate)
