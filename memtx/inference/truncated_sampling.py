"""Draws of ids from distributions that temperature and filters change: top-k, top-p, min-p and typical, in this order.

No vocabulary is sorted. A row with top-k has few candidates. In others a token is sampled and rejected if a filter
excludes it, with all tokens that rank behind it, which leaves the distribution of the rest as it is (Ye et al. 2025,
FlashInfer). Sums are taken in blocks, so that a row gives the same id alone and in a batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from memtx.inference.sampling import SamplingParams

BLOCK = 128
"""Tokens per partial sum."""

TOP_K_BLOCKS = (32, 4)
"""Tokens per maximum in the search for the largest logits, first in all and then in the best blocks."""

BELOW_ONE = 1 - 2**-24
"""Largest float32 below 1."""

MIN_LOG_WEIGHT = -200.0
"""Logarithm to base 2 below that of every float32, and finite."""

MIN_TEMPERATURE = 1e-30
"""Lower temperatures are greedy already: a quotient of this size never overflows."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest of ``(batch, length)`` scores and their indices, both ``(batch, k)``.

    The largest come first, equal ones by index. They are searched in the k blocks of the largest maxima, which hold
    them all, and there in smaller blocks.
    """
    values, best_blocks = scores, list[tuple[Tensor, int]]()
    for size in TOP_K_BLOCKS:
        if values.shape[1] % size == 0 and 4 * k <= values.shape[1] // size:
            blocks = values.view(len(values), -1, size)
            best = blocks.amax(-1).topk(k, dim=1, sorted=False).indices
            values = blocks.gather(1, best[..., None].expand(-1, -1, size)).flatten(1)
            best_blocks.append((best, size))
    values, indices = values.topk(k, dim=1, sorted=False)
    for best, size in reversed(best_blocks):
        indices = best.gather(1, indices // size) * size + indices % size
    indices, order = indices.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def draw_tokens(
    scores: Tensor, highest: Tensor, params: Sequence[SamplingParams], randoms: Sequence[Random]
) -> list[int]:
    """Return an id for each row of ``(batch, length)`` scores, which are overwritten.

    ``length`` is a multiple of ``BLOCK``; ``highest``, ``(batch, 1)``, has each row's maximum, which is finite.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for index, param in enumerate(params):
        num_candidates = 0
        if 0 < param.top_k < scores.shape[1]:
            # Some more, for tokens as likely as the last; a function of the row alone.
            num_candidates = min(-(-param.top_k // 16) * 16 + 16, scores.shape[1])
        groups.setdefault((num_candidates, param.typical_p < 1), []).append(index)
    tokens = [0] * len(params)
    for (num_candidates, is_typical), indices in groups.items():
        is_all = len(indices) == len(params)
        part, part_highest = (scores, highest) if is_all else (scores[indices], highest[indices])
        group = [params[index] for index in indices], [randoms[index] for index in indices]
        if num_candidates:
            sampled = _draw_candidates(part, part_highest, *group, num_candidates)
        else:
            sampled = _draw_any(part, part_highest, *group, is_typical)
        for index, token in zip(indices, sampled, strict=True):
            tokens[index] = token
    return tokens


def _to_log_weights(scores: Tensor, highest: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return logarithms of probabilities up to a factor, to base 2, in place of the scores."""
    temperatures = [max(param.temperature, MIN_TEMPERATURE) * math.log(2) for param in params]
    return scores.sub_(highest).div_(_column(temperatures, scores))


def _draw_candidates(
    scores: Tensor, highest: Tensor, params: Sequence[SamplingParams], randoms: Sequence[Random], count: int
) -> list[int]:
    """Return ids sampled among the ``count`` best of each row."""
    values, ids = top_k(scores, count)
    weights = _to_log_weights(values, highest, params).exp2_().double()
    last = torch.tensor([[min(param.top_k or count, count) - 1] for param in params], device=scores.device)
    weights = weights.masked_fill_(weights < weights.gather(1, last), 0.0)
    ends = weights.cumsum(1)
    weights.masked_fill_(ends - weights >= _column([param.top_p for param in params], ends) * ends[:, -1:], 0.0)
    weights.masked_fill_(weights < _column([param.min_p for param in params], weights) * weights[:, :1], 0.0)
    if any(param.typical_p < 1 for param in params):
        log_weights = weights.log2().clamp_(min=MIN_LOG_WEIGHT)
        # The distance of the surprisal from the entropy.
        surprisals = (log_weights - (log_weights * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)).abs_()
        ranks, order = surprisals.sort(dim=1, stable=True)
        ends = weights.gather(1, order).cumsum(1)
        limits = _column([param.typical_p for param in params], ends) * ends[:, -1:]
        border = ranks.gather(1, (ends < limits).sum(1, keepdim=True).clamp_(max=count - 1))
        weights.masked_fill_(surprisals > border, 0.0)
    ends = weights.cumsum(1)
    uniform = torch.tensor([[random.random()] for random in randoms], dtype=torch.float64, device=scores.device)
    tokens: list[int] = ids.gather(1, _first_above(ends, uniform * ends[:, -1:]))[:, 0].tolist()
    return tokens


def _draw_any(
    scores: Tensor, highest: Tensor, params: Sequence[SamplingParams], randoms: Sequence[Random], is_typical: bool
) -> list[int]:
    """Return ids sampled among all of each row."""
    log_weights = _to_log_weights(scores, highest, params)
    weights = workspace("weights", len(scores), scores.shape[1], scores.device) if is_typical else log_weights
    torch.exp2(log_weights, out=weights)  # faster than exp
    ps = [param.typical_p if is_typical else param.top_p for param in params]
    if not is_typical:
        limits = _column(ps, weights).double() * _sum(weights)
    elif any(param.top_p < 1 for param in params):
        _keep_top_p(weights, [param.top_p for param in params])
    _keep_at_least(weights, [param.min_p for param in params])
    ranks = None
    if is_typical:
        totals = _sum(weights)
        limits = _column(ps, weights).double() * totals
        product = workspace("before", len(scores), scores.shape[1], scores.device)
        torch.mul(log_weights.clamp_(min=MIN_LOG_WEIGHT), weights, out=product)
        # How far the surprisal of each token is from the entropy.
        ranks = log_weights.sub_((_sum(product) / totals).to(scores.dtype)).abs_()
    limits.masked_fill_(torch.tensor(ps, device=weights.device)[:, None] >= 1, math.inf)
    return _draw_until_accepted(weights, ranks, limits if min(ps) < 1 else None, randoms)


def _draw_until_accepted(
    weights: Tensor, ranks: Tensor | None, limits: Tensor | None, randoms: Sequence[Random]
) -> list[int]:
    """Return ids sampled by weights, of those before which tokens of less than the limit rank.

    Args:
        weights: ``(batch, length)``, probabilities up to a factor.
        ranks: ``(batch, length)``, lower ones first. None ranks by weight, the largest first.
        limits: ``(batch, 1)`` float64, sums of weights. None accepts all.
        randoms: Sources of random numbers of the rows.
    """
    tokens = [0] * len(randoms)
    pending = list(range(len(randoms)))
    while pending:
        uniform = torch.tensor([[randoms[index].random()] for index in pending], dtype=torch.float64)
        sampled = _inverse_cdf(weights, uniform.to(weights.device))
        if limits is None:
            return [token for (token,) in sampled.tolist()]
        border = (weights if ranks is None else ranks).gather(1, sampled)
        before = workspace("before", len(weights), weights.shape[1], weights.device)
        if ranks is None:
            # Scaled by the border, so that one number is the threshold of all rows.
            torch.div(weights, border, out=before)
            before = F.threshold(before, 1.0, 0.0, inplace=True).mul_(border)
        else:
            torch.lt(ranks, border, out=before).mul_(weights)  # as numbers: a mask would be slower
        # The device is waited for once a round.
        results = torch.cat([sampled, (_sum(before) >= limits).to(sampled.dtype)], 1).tolist()
        for index, (token, _) in zip(pending, results, strict=True):
            tokens[index] = token
        rejected = [position for position, (_, is_rejected) in enumerate(results) if is_rejected]
        # All that ranks after a rejected token is rejected with it.
        weights, limits = before[rejected], limits[rejected]
        ranks = None if ranks is None else ranks[rejected]
        pending = [pending[position] for position in rejected]
    return tokens


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as ``(batch, 1)`` float32 on the device of ``like``."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _sum(x: Tensor) -> Tensor:
    """Return the sums of ``(batch, length)`` as ``(batch, 1)`` float64."""
    return x.view(len(x), -1, BLOCK).sum(-1).double().sum(1, keepdim=True)


def _inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the index at which the cumulative weights exceed ``uniform`` of their sum, ``(batch, 1)`` int64."""
    blocks = weights.view(len(weights), -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(1)
    target = uniform * ends[:, -1:]
    block = _first_above(ends, target)
    target = target - torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(1)
    return block * BLOCK + _first_above(inside, target)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Return the first index of ascending ends above the target; if rounding leaves none, the last that is a step."""
    last_step = (ends < ends[:, -1:]).sum(1, keepdim=True)
    return torch.minimum((ends <= target).sum(1, keepdim=True), last_step)


def _keep_at_least(weights: Tensor, floors: Sequence[float]) -> None:
    """Set weights of each row below its floor to 0; a floor of 0 keeps all."""
    indices = [index for index, floor in enumerate(floors) if floor > 0]
    if indices:
        is_all = len(indices) == len(weights)
        part, floor = weights if is_all else weights[indices], _column([floors[index] for index in indices], weights)
        # Scaled by the floor, so that one number is the threshold of all rows; a quotient of equal numbers is exact.
        F.threshold(part.div_(floor), BELOW_ONE, 0.0, inplace=True).mul_(floor)
        if not is_all:
            weights[indices] = part


def _keep_top_p(weights: Tensor, ps: Sequence[float]) -> None:
    """Set weights of each row to 0 if those above them sum to the fraction ``p`` or more.

    The smallest weight to keep is found by bisection of its bits, which order as the numbers do.
    """
    limits = _column([p if p < 1 else math.inf for p in ps], weights).double() * _sum(weights)
    low = torch.zeros(len(weights), 1, dtype=torch.int32, device=weights.device)
    high = torch.ones_like(low, dtype=torch.float32).view(torch.int32)  # the largest weight is 1
    above = workspace("before", len(weights), weights.shape[1], weights.device)
    for _ in range(30):
        middle = low + (high - low) // 2
        torch.gt(weights, middle.view(torch.float32), out=above).mul_(weights)
        is_kept = _sum(above) < limits
        low, high = torch.where(is_kept, low, middle), torch.where(is_kept, middle, high)
    torch.ge(weights, high.view(torch.float32), out=above)
    weights.mul_(above)


def workspace(name: str, batch_size: int, length: int, device: torch.device) -> Tensor:
    """Return a float32 buffer of this shape, the same for each call of a thread: new memory would cost page faults."""
    if device.type != "cpu":
        return torch.empty(batch_size, length, device=device)
    buffer: Tensor | None = getattr(_BUFFERS, name, None)
    if buffer is None or buffer.numel() < batch_size * length:
        buffer = torch.empty(batch_size * length)
        setattr(_BUFFERS, name, buffer)
    return buffer[: batch_size * length].view(batch_size, length)


_BUFFERS = threading.local()
