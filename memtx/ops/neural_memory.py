"""The neural memory of Titans (Behrouz et al. 2025, section 3): a small network that learns at every token.

The network M maps keys to values; its weights W are the memory. A token's gradient of |M(k) - v|^2 is what M did not
expect. With step theta, momentum eta and forgetting alpha, all of the token (equations 13 and 14):

    S_t = eta_t S_{t-1} - theta_t grad_t,    W_t = (1 - alpha_t) W_{t-1} + S_t.

Gradients are taken at the weights of the chunk's start (section 3.2), so those of a token are outer products of a
layer's input and its error, and M is read at every W_t of a chunk by products of queries and inputs, as in attention;
no weights but the chunk's last are formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = tuple[Tensor, ...]
"""The network's matrices, one per layer, each ``(batch, heads, in, out)``."""


@dataclass(frozen=True)
class Gates:
    """A token's gates, each ``(batch, heads, tokens)``.

    Attributes:
        step: theta, the size of a step.
        log_momentum: log eta, below 0.
        log_keep: log(1 - alpha), at most 0.
    """

    step: Tensor
    log_momentum: Tensor
    log_keep: Tensor


def apply_network(weights: Weights, x: Tensor) -> Tensor:
    """Return M(x) for x ``(batch, heads, tokens, width)``: matrices with SiLU between them."""
    for matrix in weights[:-1]:
        x = F.silu(x @ matrix)
    return x @ weights[-1]


def compute_gradients(weights: Weights, k: Tensor, v: Tensor, max_norm: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return each layer's inputs and errors, whose outer products are the tokens' gradients.

    Errors are scaled so that the norm of a token's gradient, over all layers, is at most ``max_norm``.
    """
    inputs, products = [k], []
    for matrix in weights[:-1]:
        products.append(inputs[-1] @ matrix)
        inputs.append(F.silu(products[-1]))
    errors = [2.0 * (inputs[-1] @ weights[-1] - v)]
    for matrix, product in zip(weights[:0:-1], products[::-1], strict=True):
        sigmoid = torch.sigmoid(product)
        errors.insert(0, (errors[0] @ matrix.mT) * sigmoid * (1.0 + product * (1.0 - sigmoid)))
    squares = [x.square().sum(-1) * e.square().sum(-1) for x, e in zip(inputs, errors, strict=True)]
    # The square root of 0 has no gradient.
    norm = torch.stack(squares).sum(0).clamp(min=max_norm**2).sqrt()
    return inputs, [error * (max_norm / norm)[..., None] for error in errors]


def learn_chunk(
    weights: Weights, momentum: Weights, start: Weights, q: Tensor, k: Tensor, v: Tensor, gates: Gates, mask: Tensor,
    max_norm: float,
) -> tuple[Tensor, Weights, Weights]:  # fmt: skip
    """Learn and read the tokens of a chunk, or of a part of one, in order.

    Args:
        weights: W before the tokens.
        momentum: S before the tokens.
        start: Weights at the start of the chunk, at which gradients are taken.
        q: Queries, ``(batch, heads, tokens, width)``.
        k: Keys, in the same shape.
        v: Values, in the same shape.
        gates: Gates of the tokens.
        mask: Tokens that count, ``(batch, tokens)`` bool; the others change nothing.
        max_norm: Largest norm of a token's gradient.

    Returns:
        The reads M(q) at every token's weights, after its own step, and the weights and momentum after the tokens.
    """
    counts = mask[:, None].to(k.dtype)
    inputs, errors = compute_gradients(start, k, v, max_norm)
    keep = _decay((gates.log_keep * counts).cumsum(-1))
    momenta = _decay((gates.log_momentum * counts).cumsum(-1))
    # W_t = keep_t W_0 + momenta_t S_0 - the gradients i by their shares (t, i).
    keep_start, keep = keep[..., :1], keep[..., 1:] * counts[..., None, :]
    momenta_start, momenta = momenta[..., :1], momenta[..., 1:] * (gates.step * counts)[..., None, :]
    from_momentum, shares = keep @ momenta_start, keep @ momenta

    reads = q
    for number, (matrix, velocity) in enumerate(zip(weights, momentum, strict=True)):
        from_tokens = (shares * (reads @ inputs[number].mT)) @ errors[number]
        product = keep_start * (reads @ matrix) + from_momentum * (reads @ velocity) - from_tokens
        reads = F.silu(product) if number < len(weights) - 1 else product
    next_weights, next_momentum = [], []
    for matrix, velocity, x, error in zip(weights, momentum, inputs, errors, strict=True):
        step, velocity_step = (x.mT @ (part[..., -1, :, None] * error) for part in (shares, momenta))
        faded = keep_start[..., -1:, :] * matrix + from_momentum[..., -1:, :] * velocity
        next_weights.append(faded - step)
        next_momentum.append(momenta_start[..., -1:, :] * velocity - velocity_step)
    return reads, tuple(next_weights), tuple(next_momentum)


def _decay(total: Tensor) -> Tensor:
    """Return the decay from before the chunk and from each token i to each token t, ``(..., tokens, 1 + tokens)``.

    The argument is the cumulative sum of the log decays, ``(..., tokens)``.
    """
    total = F.pad(total, (1, 0))
    later = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf"))
    return gap.exp()[..., 1:, :]
