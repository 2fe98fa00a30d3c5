"""Truncated back-propagation through time over the segments of one batch (Williams and Peng 1990).

With replay only the states between the segments are kept, and a segment is read again when its gradient is due:
Memformer's memory replay (Wu et al. 2020, section 3.5), which is checkpointing at segment borders (Chen et al. 2016),
for every kind of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtx.memory.base import Losses
from memtx.models.memory_transformer import MemoryOutput, MemoryTransformer
from memtx.ops.cross_entropy import IGNORED
from memtx.state import MemoryState

Judge = Callable[[MemoryOutput, slice], Losses]
"""Makes losses of a segment's output, hidden states in it, and of the segment's places in the batch."""


@dataclass(frozen=True)
class Unrolled:
    """A horizon's result.

    Attributes:
        loss: mean negative log-likelihood of all scored labels (nats), or what was judged in its place, plus the
            auxiliary losses' means over the segments; its graph spans the horizon.
        nll: (rows, horizon * segment), each label's negative log-likelihood, 0 where not scored.
        scored: how many labels were scored.
        losses: the auxiliary losses, and those that were judged, by name, detached.
        state: after the last segment, cut from the graph.
    """

    loss: Tensor
    nll: Tensor
    scored: Tensor
    losses: Losses
    state: MemoryState


def unroll(
    model: MemoryTransformer,
    tokens: Tensor,
    labels: Tensor,
    starts: Tensor,
    state: MemoryState,
    *,
    segment: int,
    replay: bool = False,
    judge: Judge | None = None,
) -> Unrolled:
    """Read a batch segment by segment with one graph through all of them.

    Args:
        model: the model.
        tokens: (rows, horizon * segment) int64; a shorter last segment is read as it is.
        labels: likewise, -100 where nothing is scored.
        starts: likewise bool, where documents begin.
        state: as the previous batch left it, cut from its graph.
        segment: tokens a call.
        replay: keep states alone and read every segment once more in the backward pass: the same gradients, about
            a third more time, and the memory of one segment however many there are.
        judge: what is learned in place of the labels' likelihood, of each segment; weighed as that is.
    """

    def read(tokens: Tensor, state: MemoryState, starts: Tensor, labels: Tensor, part: slice) -> Any:
        out = model(tokens, state, starts=starts, labels=labels, return_hidden=judge is not None)
        return (out, {}) if judge is None else (replace(out, hidden_states=None), judge(out, part))

    scored = (labels != IGNORED).sum()
    language: Tensor | float = 0.0
    judged: dict[str, Tensor] = {}
    nll: list[Tensor] = []
    named: dict[str, list[Tensor]] = {}
    for at in range(0, tokens.shape[1], segment):
        part = slice(at, at + segment)
        given = (
            tokens[:, part],
            state,
            starts[:, part],
            labels[:, part],
            part,
        )
        out, own = checkpoint(read, *given, use_reentrant=False) if replay else read(*given)
        state = out.state
        # Every label weighs alike, so the mean is over the horizon, not of its segments' means.
        dtype = torch.promote_types(out.language_loss.dtype, torch.float32)
        share = (labels[:, part] != IGNORED).sum().clamp(min=1).to(dtype) / scored.clamp(min=1)
        language = language + (sum(own.values()) if judge is not None else out.language_loss) * share
        for name, value in own.items():
            judged[name] = judged.get(name, 0.0) + (value * share).detach()
        nll.append(out.nll)
        for name, value in out.losses.items():
            named.setdefault(name, []).append(value)
    losses = {name: torch.stack(values).mean() for name, values in named.items()}
    loss = language + sum(losses.values())
    assert isinstance(loss, Tensor)
    return Unrolled(
        loss,
        torch.cat(nll, dim=1),
        scored,
        {**{name: value.detach() for name, value in losses.items()}, **judged},
        state.detach(),
    )
