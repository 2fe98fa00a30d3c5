"""Attention over earlier positions whose values are the tokens that followed them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from memtx.ops.attention.mask import Visibility, create_mask, find_key_bounds
from memtx.ops.cpu import copying as cpu_copying

MAX_BLOCK_SCORES = 1 << 22
"""Maximum number of scores computed at once without gradient: 16 MiB in float32."""


class _CopiedProbability(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        past_keys: Tensor,
        keys: Tensor,
        next_tokens: Tensor,
        labels: Tensor,
        visibility: Visibility,
    ) -> tuple[Tensor, Tensor]:
        all_keys = torch.cat([past_keys, keys], dim=1)
        needs_grad = any(ctx.needs_input_grad[:3])
        ctx.visibility, saved = visibility, []
        copied, best = torch.zeros_like(q[..., 0]), torch.zeros_like(q[..., 0])
        # Backward needs all weights, so it has a single block.
        for queries, low, high in _iter_blocks(q, visibility, single=needs_grad):
            weights, best[:, queries] = _compute_weights(q, all_keys, visibility, queries, (low, high))
            is_copy = next_tokens[:, None, low:high] == labels[:, queries, None]
            copied[:, queries] = torch.where(is_copy, weights, 0.0).sum(-1)
            saved.append(weights)
        if needs_grad:
            ctx.save_for_backward(q, all_keys, next_tokens, labels, copied, *saved)
            ctx.num_past = past_keys.shape[1]
        ctx.mark_non_differentiable(best)
        return copied, best

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, all_keys, next_tokens, labels, copied, weights = ctx.saved_tensors
        (low, high), num_past = _visible_range(ctx.visibility, slice(0, q.shape[1])), ctx.num_past
        # d copied / d score = weight * (is_copy - copied)
        is_copy = next_tokens[:, None, low:high] == labels[:, :, None]
        grad_copy, grad_other = grad * (1.0 - copied), -grad * copied
        grad_scores = torch.where(is_copy, grad_copy[..., None], grad_other[..., None]).mul_(weights)
        grad_q = torch.bmm(grad_scores, all_keys[:, low:high])
        # Keys from low on: those of the past, then those from first_key on.
        split, first_key = max(0, num_past - low), max(0, low - num_past)
        grad_past = grad_keys = None
        if ctx.needs_input_grad[1]:
            grad_past = torch.zeros_like(all_keys[:, :num_past])
            grad_past[:, low:] = torch.bmm(grad_scores[..., :split].mT, q)
        if ctx.needs_input_grad[2]:
            grad_keys = torch.zeros_like(all_keys[:, num_past:])
            grad_keys[:, first_key : high - num_past] = torch.bmm(grad_scores[..., split:].mT, q)
        return grad_q, grad_past, grad_keys, None, None, None


def copied_probability(
    q: Tensor, past_keys: Tensor, keys: Tensor, next_tokens: Tensor, labels: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Return the probability that copying gives to each label, and each query's largest score, without gradient.

    Both are ``(batch, length)``, and arbitrary for a query that sees no key.

    Args:
        q: Queries, ``(batch, length, key_dim)``, scaled.
        past_keys: Keys of earlier positions, ``(batch, past, key_dim)``.
        keys: Keys of the queries' own positions, ``(batch, length, key_dim)``.
        next_tokens: Token that followed each key, ``(batch, past + length)`` integers; that of the last key is unused.
        labels: Token to predict at each query, ``(batch, length)``.
        visibility: Visibility of the keys, in one range.
    """
    if q.device.type == "cpu" and q.dtype == torch.float32 and cpu_copying.is_available():
        return cpu_copying.copied_probability(q, past_keys, keys, next_tokens, labels, visibility)
    copied, best = _CopiedProbability.apply(q, past_keys, keys, next_tokens, labels, visibility)  # type: ignore[no-untyped-call]
    return copied, best


def copied_distribution(
    q: Tensor, all_keys: Tensor, next_tokens: Tensor, visibility: Visibility, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return the probability that copying gives to every token, ``(batch, length, vocab_size)``, and the best scores.

    Arguments as in :func:`copied_probability`, with the keys of all positions, ``(batch, past + length, key_dim)``.
    """
    probs, best = q.new_zeros(*q.shape[:2], vocab_size), q.new_zeros(q.shape[:2])
    for queries, low, high in _iter_blocks(q, visibility):
        weights, best[:, queries] = _compute_weights(q, all_keys, visibility, queries, (low, high))
        index = next_tokens[:, None, low:high].long().expand(weights.shape)
        probs[:, queries] = probs[:, queries].scatter_add(2, index, weights)
    return probs, best


def _iter_blocks(q: Tensor, visibility: Visibility, *, single: bool = False) -> Iterator[tuple[slice, int, int]]:
    """Yield blocks of queries with the range of keys that each may see; one block of all queries if ``single``."""
    length = q.shape[1]
    block = length if single else max(1, MAX_BLOCK_SCORES // (q.shape[0] * visibility.num_keys))
    for start in range(0, length, block):
        queries = slice(start, min(start + block, length))
        yield queries, *_visible_range(visibility, queries)


def _visible_range(visibility: Visibility, queries: slice) -> tuple[int, int]:
    """Return the keys [low, high), at least one, that a block of queries may see."""
    low, high = find_key_bounds(visibility.key_ranges, queries.start, queries.stop)[0]
    return (low, high) if high > low else (0, 1)


def _compute_weights(
    q: Tensor, all_keys: Tensor, visibility: Visibility, queries: slice, key_range: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the attention weights, ``(batch, queries, keys)``, and the largest scores, ``(batch, queries)``.

    A query that sees no key has equal weights.
    """
    low, high = key_range
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.bmm(q[:, queries], all_keys[:, low:high].mT)
    hidden = create_mask(visibility, (queries.start, queries.stop), key_range).logical_not_()
    # A finite number, so that a query that sees no key has no NaN.
    scores.masked_fill_(hidden, -1e30)
    return torch.softmax(scores, dim=-1), scores.detach().amax(-1)
