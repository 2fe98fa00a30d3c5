"""What a model's own attention over a whole text would have said: the teacher of the memory that stands in for it.

The Kullback-Leibler divergence from the teacher's next-token distribution (distillation, Hinton et al. 2015, section 2,
at temperature 1), computed by chunks that the backward pass makes again, so that whole logits never exist.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtx.models.memory_transformer import MemoryTransformer
from memtx.ops.cross_entropy import IGNORED

CHUNK = 512
"""Tokens whose logits exist at a time, of both."""


@torch.no_grad()
def taught(model: MemoryTransformer, tokens: Tensor, starts: Tensor) -> Tensor:
    """Return (rows, n, dim) the last layer's outputs with every token of the text in sight and no memory.

    Args:
        model: whose weights are used as they are now, without dropout.
        tokens: (rows, n) int64.
        starts: (rows, n) bool, where documents begin.
    """
    teacher = model.without_memory(tokens.shape[1]).eval()
    hidden = teacher(tokens, starts=starts, labels=torch.full_like(tokens, IGNORED), return_hidden=True).hidden_states
    assert hidden is not None
    last: Tensor = hidden[-1]
    return last


def divergence(model: MemoryTransformer, hidden: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the mean divergence of the distributions at scored labels, in nats.

    Args:
        model: whose norm and head both go through.
        hidden: (rows, n, dim), the last layer's outputs.
        teacher: likewise, of :func:`taught`.
        labels: (rows, n) int64, -100 where nothing is scored.
    """

    def log_probabilities(x: Tensor) -> Tensor:
        logits = model.head(model.norm(x))
        return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)

    def part(own: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad():
            target = log_probabilities(wanted)
        return F.kl_div(log_probabilities(own), target, reduction="sum", log_target=True)

    scored = labels.flatten() != IGNORED
    own, wanted = hidden.flatten(0, 1)[scored], teacher.flatten(0, 1)[scored]
    total = hidden.sum() * 0.0
    for mine, theirs in zip(torch.split(own, CHUNK), torch.split(wanted, CHUNK), strict=True):
        total = total + checkpoint(part, mine, theirs, use_reentrant=False)
    return total / scored.sum().clamp(min=1)
