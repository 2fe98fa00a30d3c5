"""Truncated back-propagation through time over the segments of one batch (Williams and Peng 1990)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.memory.base import Losses
from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cross_entropy import IGNORED
from memtx.state import MemoryState


@dataclass(frozen=True)
class Unrolled:
    """A horizon's result.

    Attributes:
        loss: mean negative log-likelihood of all scored labels (nats) plus the auxiliary losses' means over
            the segments; its graph spans the horizon.
        nll: (rows, horizon * segment), each label's negative log-likelihood, 0 where not scored.
        scored: how many labels were scored.
        losses: the auxiliary losses by name, detached.
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
) -> Unrolled:
    """Read a batch segment by segment with one graph through all of them.

    Args:
        model: the model.
        tokens: (rows, horizon * segment) int64; a shorter last segment is read as it is.
        labels: likewise, -100 where nothing is scored.
        starts: likewise bool, where documents begin.
        state: as the previous batch left it, cut from its graph.
        segment: tokens a call.
    """
    scored = (labels != IGNORED).sum()
    language: Tensor | float = 0.0
    nll: list[Tensor] = []
    named: dict[str, list[Tensor]] = {}
    for at in range(0, tokens.shape[1], segment):
        part = slice(at, at + segment)
        out = model(tokens[:, part], state, starts=starts[:, part], labels=labels[:, part])
        state = out.state
        # Every label weighs alike, so the mean is over the horizon, not of its segments' means.
        dtype = torch.promote_types(out.language_loss.dtype, torch.float32)
        share = (labels[:, part] != IGNORED).sum().clamp(min=1).to(dtype) / scored.clamp(min=1)
        language = language + out.language_loss * share
        nll.append(out.nll)
        for name, value in out.losses.items():
            named.setdefault(name, []).append(value)
    losses = {name: torch.stack(values).mean() for name, values in named.items()}
    loss = language + sum(losses.values())
    assert isinstance(loss, Tensor)
    return Unrolled(
        loss, torch.cat(nll, dim=1), scored, {name: value.detach() for name, value in losses.items()}, state.detach()
    )
