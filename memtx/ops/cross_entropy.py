"""Output projection and cross entropy in chunks of tokens, so that whole logits never exist.

The gradient is made in the forward pass, while a chunk's logits are at hand: nothing is computed twice and
nothing of the vocabulary's width is kept (the way of Liger Kernel, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtx.ops.cpu.linear import accumulate_weight_grad, linear

IGNORE_INDEX = -100
"""The label of a token that is not scored."""

MAX_CHUNK_LOGITS = 1 << 21
"""Logits a chunk at most (8 MiB in float32): the next passes find them in the cache."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, labels: Tensor, needs_grad: bool, max_chunk_logits: int
    ) -> tuple[Tensor, Tensor]:
        kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            hidden_states, narrow = (
                hidden_states.to(torch.get_autocast_dtype(device)),
                weight.to(torch.get_autocast_dtype(device)),
            )
        else:
            narrow = weight
        nll = torch.zeros(hidden_states.shape[0], dtype=kind, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if needs_grad else None
        # The vocabulary lies along memory: the way that the product is added the fastest.
        grad_weight = weight.new_zeros(weight.shape[::-1]) if needs_grad else None
        step = max(1, max_chunk_logits // weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_states.shape[0], step):
                part = slice(start, start + step)
                scored = labels[part] != IGNORE_INDEX
                index = labels[part].masked_fill(~scored, 0)[:, None]
                logits = linear(hidden_states[part], narrow)
                told, best = (x[:, 0].to(kind) for x in (logits.gather(1, index), logits.amax(1, keepdim=True)))
                chances = torch.softmax(logits, dim=-1, dtype=kind)
                # log sum exp = max - log softmax(max): exact, as no chance of a maximum is small.
                nll[part] = (best - chances.amax(1).log() - told).masked_fill(~scored, 0.0)
                if grad_hidden is None or grad_weight is None:
                    continue
                # d nll / d logits = softmax - one at the label.
                chances.scatter_add_(1, index, torch.full_like(told, -1.0)[:, None])
                grad = chances.to(narrow.dtype)
                grad_hidden[part] = linear(grad, narrow.T).masked_fill_(~scored[:, None], 0.0)
                accumulate_weight_grad(grad_weight, hidden_states[part].masked_fill(~scored[:, None], 0.0), grad)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = torch.mul(grad_weight.T, grad_total, out=grad_weight.new_empty(grad_weight.shape[::-1]))
        return (grad_hidden * grad_total).to(grad_hidden.dtype), scaled, None, None, None


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, *, max_chunk_logits: int = MAX_CHUNK_LOGITS
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of the labels, and each one's.

    Args:
        hidden_states: (tokens, dim).
        weight: (vocab, dim), the output projection.
        labels: (tokens,) int64; -100 where nothing is scored.
        max_chunk_logits: logits held at a time, at most.

    Returns:
        the sum, a scalar to learn from; and (tokens,) float32 (float64 for float64 input), for measuring only
        (no gradient), 0 where nothing is scored.
    """
    learns = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    total, nll = _LinearCrossEntropy.apply(hidden_states, weight, labels, learns, max_chunk_logits)  # type: ignore[no-untyped-call]
    return total, nll
