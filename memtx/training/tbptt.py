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
from memtx.models.memory_transformer import MemoryTransformer
from memtx.models.recurrent_lm import MemoryOutput
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.state import MemoryState

LossFn = Callable[[MemoryOutput, slice], Losses]
"""Makes losses of a segment's output, hidden states in it, and of the segment's places in the batch."""


@dataclass(frozen=True)
class UnrollOutput:
    """A horizon's result.

    Attributes:
        loss: mean negative log-likelihood of all scored labels (nats), or what was judged in its place, plus the
            auxiliary losses' means over the segments; its graph spans the horizon.
        nll: (rows, horizon * segment), each label's negative log-likelihood, 0 where not scored.
        num_scored: how many labels were scored.
        losses: the auxiliary losses, and those that were judged, by name, detached.
        state: after the last segment, cut from the graph.
    """

    loss: Tensor
    nll: Tensor
    num_scored: Tensor
    losses: Losses
    state: MemoryState


def unroll(
    model: MemoryTransformer,
    tokens: Tensor,
    labels: Tensor,
    document_starts: Tensor,
    state: MemoryState,
    *,
    segment_length: int,
    replay: bool = False,
    loss_fn: LossFn | None = None,
) -> UnrollOutput:
    """Read a batch segment by segment with one graph through all of them.

    Args:
        model: the model.
        tokens: (rows, horizon * segment) int64; a shorter last segment is read as it is.
        labels: likewise, -100 where nothing is scored.
        document_starts: likewise bool, where documents begin.
        state: as the previous batch left it, cut from its graph.
        segment_length: tokens a call.
        replay: keep states alone and read every segment once more in the backward pass: the same gradients, about
            a third more time, and the memory of one segment however many there are.
        loss_fn: what is learned in place of the labels' likelihood, of each segment; weighed as that is.
    """

    def read(tokens: Tensor, state: MemoryState, starts: Tensor, labels: Tensor, part: slice) -> Any:
        out = model(tokens, state, document_starts=starts, labels=labels, return_hidden_states=loss_fn is not None)
        return (out, {}) if loss_fn is None else (replace(out, hidden_states=None), loss_fn(out, part))

    scored = (labels != IGNORE_INDEX).sum()
    language: Tensor | float = 0.0
    judged: dict[str, Tensor] = {}
    nll: list[Tensor] = []
    named: dict[str, list[Tensor]] = {}
    for at in range(0, tokens.shape[1], segment_length):
        part = slice(at, at + segment_length)
        given = (
            tokens[:, part],
            state,
            document_starts[:, part],
            labels[:, part],
            part,
        )
        out, own = checkpoint(read, *given, use_reentrant=False) if replay else read(*given)
        state = out.state
        # Every label weighs alike, so the mean is over the horizon, not of its segments' means.
        dtype = torch.promote_types(out.language_loss.dtype, torch.float32)
        share = (labels[:, part] != IGNORE_INDEX).sum().clamp(min=1).to(dtype) / scored.clamp(min=1)
        language = language + (sum(own.values()) if loss_fn is not None else out.language_loss) * share
        for name, value in own.items():
            judged[name] = judged.get(name, 0.0) + (value * share).detach()
        nll.append(out.nll)
        for name, value in out.aux_losses.items():
            named.setdefault(name, []).append(value)
    losses = {name: torch.stack(values).mean() for name, values in named.items()}
    loss = language + sum(losses.values())
    assert isinstance(loss, Tensor)
    return UnrollOutput(
        loss,
        torch.cat(nll, dim=1),
        scored,
        {**{name: value.detach() for name, value in losses.items()}, **judged},
        state.detach(),
    )
