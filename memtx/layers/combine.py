"""Combination of attention outputs with the readouts of memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memtx.memory.base import Readout
from memtx.ops.attention.reference import merge_attention


def combine_readouts(attended: Tensor, lse: Tensor | None, readouts: Sequence[Readout]) -> Tensor:
    """Return the attention outputs, ``(batch, heads, length, head_dim)``, combined with all readouts.

    Readouts that have a log-sum-exp and no gate come first, in one softmax with the attention and so in any order. The
    others follow in their order, mixed in by their gate or added. ``lse``, the attention's own log-sum-exp, which is
    ``(batch, heads, length)``, is required if a readout has one.
    """
    parts = [
        (readout.out.to(attended.dtype), readout.lse)
        for readout in readouts
        if readout.lse is not None and readout.gate is None
    ]
    if parts:
        assert lse is not None
        attended, lse = merge_attention([(attended, lse), *parts])
    for readout in readouts:
        if readout.gate is not None:
            share = readout.gate
            if readout.lse is not None:
                assert lse is not None
                share = share * torch.sigmoid(readout.lse - lse)[..., None]
            attended = attended + (share * (readout.out - attended)).to(attended.dtype)
        elif readout.lse is None:
            attended = attended + readout.out.to(attended.dtype)
    return attended


def apply_gate(readout: Readout, gate: Tensor) -> Readout:
    """Return a readout scaled by a gate from -1 to 1 per head, ``(heads,)``; at 0 the layer's output is as without it.

    The gate is learned per head and starts at 0, as in Flamingo (Alayrac et al. 2022, section 2.2). The readout then
    has no gradient at first but the gate does, so both learn from the second step on. A readout with a log-sum-exp is
    scaled in proportion to its share in the joint softmax, so a gate of 1 gives that softmax.
    """
    gate = gate[:, None, None]
    if readout.gate is None and readout.lse is None:
        return replace(readout, out=readout.out * gate.to(readout.out.dtype))
    return replace(readout, gate=gate if readout.gate is None else readout.gate * gate)
