"""Truncated back-propagation through time over the segments of a batch (Williams and Peng 1990).

With replay, only the states between segments are stored, and each segment is recomputed in the backward pass: memory
replay back-propagation (Memformer, Wu et al. 2020, section 3.5), which is checkpointing at segment boundaries (Chen et
al. 2016), for every kind of memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memtx.memory.base import Losses
from memtx.models.recurrent_lm import MemoryOutput, RecurrentModel
from memtx.ops.cross_entropy import IGNORE_INDEX
from memtx.state import MemoryState

LossFn = Callable[[MemoryOutput, slice], Losses]
"""Computes named losses of one segment from its output, hidden states included, and its slice of the batch."""


@dataclass(frozen=True)
class UnrollOutput:
    """Result of a batch of segments.

    Attributes:
        loss: Mean negative log-likelihood of all scored labels in nats, or the losses of ``loss_fn`` in its place, plus
            the auxiliary losses averaged over segments; its graph spans the batch.
        nll: Negative log-likelihood of each label, ``(batch, length)``, 0 where a label is ignored.
        num_scored: Number of scored labels, ``()``.
        losses: Auxiliary losses and those of ``loss_fn`` by name, detached.
        state: State after the last segment, detached.
    """

    loss: Tensor
    nll: Tensor
    num_scored: Tensor
    losses: Losses
    state: MemoryState


def find_scored(labels: Tensor) -> Tensor:
    """Return the positions with a label, ``(batch, length)`` bool, of token ids or vectors as in :func:`unroll`."""
    return (~labels.isnan()).any(-1) if labels.is_floating_point() else labels != IGNORE_INDEX


def unroll(
    model: RecurrentModel,
    tokens: Tensor,
    labels: Tensor,
    document_starts: Tensor,
    state: MemoryState,
    *,
    segment_length: int,
    replay: bool = False,
    loss_fn: LossFn | None = None,
) -> UnrollOutput:
    """Read a batch segment by segment, with one graph through all segments.

    Args:
        model: Model to read with.
        tokens: ``(batch, length)`` int64, or vectors ``(batch, length, input_dim)``; the last segment may be shorter
            than the others.
        labels: ``(batch, length)`` int64, -100 where nothing is scored, or vectors ``(batch, length, output_dim)``, NaN
            there.
        document_starts: ``(batch, length)`` bool, True where a document begins.
        state: Detached state after the previous batch.
        segment_length: Tokens per call.
        replay: If True, recompute each segment in the backward pass and store only the states between segments: equal
            gradients, about a third more time, and activations of a single segment.
        loss_fn: Losses to train on in place of the labels' likelihood, weighted like it.
    """

    def read(
        tokens: Tensor, state: MemoryState, document_starts: Tensor, labels: Tensor, part: slice
    ) -> tuple[MemoryOutput, Losses | None]:
        output = model(
            tokens, state, document_starts=document_starts, labels=labels, return_hidden_states=loss_fn is not None
        )
        return (output, None) if loss_fn is None else (replace(output, hidden_states=None), loss_fn(output, part))

    num_scored = find_scored(labels).sum()
    loss: Tensor | float = 0.0
    nll, aux_losses, named_losses = [], defaultdict(list), dict[str, Tensor]()
    for start in range(0, tokens.shape[1], segment_length):
        part = slice(start, start + segment_length)
        inputs = (tokens[:, part], state, document_starts[:, part], labels[:, part], part)
        output, losses = checkpoint(read, *inputs, use_reentrant=False) if replay else read(*inputs)
        assert output.language_loss is not None
        assert output.nll is not None
        # Every label has the same weight, so the mean is over the batch, not over the means of its segments.
        dtype = torch.promote_types(output.language_loss.dtype, torch.float32)
        weight = find_scored(labels[:, part]).sum().clamp(min=1).to(dtype) / num_scored.clamp(min=1)
        loss = loss + (output.language_loss if losses is None else sum(losses.values())) * weight
        for name, value in (losses or {}).items():
            named_losses[name] = named_losses.get(name, 0.0) + (value * weight).detach()
        for name, value in output.aux_losses.items():
            aux_losses[name].append(value)
        nll.append(output.nll)
        state = output.state
    mean_aux_losses = {name: torch.stack(values).mean() for name, values in aux_losses.items()}
    loss = loss + sum(mean_aux_losses.values())
    assert isinstance(loss, Tensor)
    detached = {name: value.detach() for name, value in mean_aux_losses.items()} | named_losses
    return UnrollOutput(loss, torch.cat(nll, dim=1), num_scored, detached, state.detach())
