"""Output projection and cross entropy in chunks of tokens, without the full logits.

Gradients are computed in the forward pass, while a chunk's logits exist, so logits are neither recomputed nor stored
(as in Liger Kernel, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtx.ops.cpu.linear import accumulate_weight_grad, linear

IGNORE_INDEX = -100
"""Label of tokens that do not count."""

MAX_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Maximum size of a chunk's logits in float32: on a CPU they stay in the cache, a GPU needs few large products."""

TOKENS_MULTIPLE = 128
"""Chunks of more tokens are a multiple of this, since products of other sizes waste a GPU's tiles."""


def choose_chunk_size(vocab_size: int, device: str, max_chunk_logits: int | None = None) -> int:
    """Return the number of tokens per chunk for a device type."""
    if max_chunk_logits is not None:
        return max(1, max_chunk_logits // vocab_size)
    chunk_size = max(1, MAX_CHUNK_BYTES.get(device, MAX_CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    if device == "cpu" or chunk_size < TOKENS_MULTIPLE:
        return chunk_size
    return chunk_size // TOKENS_MULTIPLE * TOKENS_MULTIPLE


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        log_share: Tensor | None,
        log_other: Tensor | None,
        labels: Tensor,
        needs_grad: bool,
        max_chunk_logits: int | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        device = hidden_states.device.type
        cast_weight = weight
        if torch.is_autocast_enabled(device):
            autocast_dtype = torch.get_autocast_dtype(device)
            hidden_states, cast_weight = hidden_states.to(autocast_dtype), weight.to(autocast_dtype)
        nll = torch.zeros(hidden_states.shape[0], dtype=dtype, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if needs_grad else None
        # Transposed, with the vocabulary contiguous: the layout in which the product is accumulated fastest.
        grad_weight = weight.new_zeros(weight.shape[::-1]) if needs_grad else None
        # The share of the head's own prediction in the probability of each label.
        posterior = torch.empty_like(nll) if log_share is not None else None
        chunk_size = choose_chunk_size(weight.shape[0], device, max_chunk_logits)
        with torch.autocast(device, enabled=False):
            for start in range(0, hidden_states.shape[0], chunk_size):
                chunk = slice(start, start + chunk_size)
                ignored = labels[chunk] == IGNORE_INDEX
                index = labels[chunk].masked_fill(ignored, 0)[:, None]
                logits = linear(hidden_states[chunk], cast_weight)
                label_logit, max_logit = logits.gather(1, index)[:, 0].to(dtype), logits.amax(1).to(dtype)
                probs = torch.softmax(logits, dim=-1, dtype=dtype)
                # logsumexp = max - log softmax(max): exact, because the largest probability is never small.
                chunk_nll = max_logit - probs.amax(1).log() - label_logit
                if posterior is not None and log_share is not None and log_other is not None:
                    log_prob = log_share[chunk] - chunk_nll
                    chunk_nll = -torch.logaddexp(log_prob, log_other[chunk])
                    posterior[chunk] = (log_prob + chunk_nll).exp().masked_fill(ignored, 0.0)
                nll[chunk] = chunk_nll.masked_fill(ignored, 0.0)
                if grad_hidden is None or grad_weight is None:
                    continue
                # d nll / d logits = softmax - one_hot(label).
                probs.scatter_add_(1, index, torch.full_like(label_logit, -1.0)[:, None])
                if posterior is not None:
                    probs.mul_(posterior[chunk, None])
                grad_logits = probs.to(cast_weight.dtype)
                grad_hidden[chunk] = linear(grad_logits, cast_weight.T).masked_fill_(ignored[:, None], 0.0)
                inputs = hidden_states[chunk].masked_fill(ignored[:, None], 0.0)
                accumulate_weight_grad(grad_weight, inputs, grad_logits)
                del logits, probs, grad_logits  # before the next chunk's
        other = None if posterior is None else (1.0 - posterior).masked_fill(labels == IGNORE_INDEX, 0.0)
        ctx.save_for_backward(grad_hidden, grad_weight, posterior, other)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, *posteriors = ctx.saved_tensors
        grad_shares = (None if posterior is None else posterior * -grad_total for posterior in posteriors)
        if grad_hidden is None:
            return None, None, *grad_shares, None, None, None
        scaled = torch.mul(grad_weight.T, grad_total, out=grad_weight.new_empty(grad_weight.shape[::-1]))
        return (grad_hidden * grad_total).to(grad_hidden.dtype), scaled, *grad_shares, None, None, None


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    log_shares: tuple[Tensor, Tensor] | None = None,
    max_chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the negative log-likelihood of the labels: the sum, with gradient, and ``(tokens,)``, without.

    Both are float32, or float64 for float64 input; tokens that do not count get 0.

    Args:
        hidden_states: ``(tokens, dim)``.
        weight: ``(vocab, dim)``, the output projection.
        labels: ``(tokens,)`` int64; -100 for tokens that do not count.
        log_shares: Log-weight of this prediction in a mixture, and log-probability that its other part adds to each
            label, both ``(tokens,)`` with gradient. None if there is no other part.
        max_chunk_logits: Maximum number of logits held at a time. Defaults to MAX_CHUNK_BYTES for the device.
    """
    needs_grad = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    log_share, log_other = log_shares or (None, None)
    total, nll = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_states, weight, log_share, log_other, labels, needs_grad, max_chunk_logits
    )
    return total, nll
