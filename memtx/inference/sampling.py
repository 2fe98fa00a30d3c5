"""Sampling of the next token: filters set the ``(vocab,)`` logits of excluded tokens to -inf, but never all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.errors import MemtxError


@dataclass(frozen=True)
class SamplingParams:
    """Options for choosing the next token; raises MemtxError if a value is out of range.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities sum to at least p; 1 keeps all.
        min_p: Keep tokens whose probability is at least this fraction of the highest; 0 keeps all.
        repetition_penalty: Values above 1 make recent tokens less likely; 1 disables it.
        greedy: If True, take the most likely token and ignore the other options except ``repetition_penalty``.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 disables it)"),
        ):
            if not is_valid:
                raise MemtxError(f"{name} is {getattr(self, name)}, expected {expected}.")


def apply_repetition_penalty(logits: Tensor, recent_tokens: Tensor, penalty: float) -> Tensor:
    """Make recent tokens, ``(length,)`` int64, less likely (CTRL, Keskar et al. 2019, section 4.1).

    Positive logits are divided by ``penalty`` and negative ones multiplied by it; duplicates count once.
    """
    if penalty == 1 or recent_tokens.numel() == 0:
        return logits
    recent = logits[recent_tokens]
    return logits.scatter(0, recent_tokens, torch.where(recent > 0, recent / penalty, recent * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the ``k`` largest logits, preferring lower ids among equals; 0 keeps all."""
    if k == 0 or k >= logits.shape[0]:
        return logits
    top = logits.sort(descending=True, stable=True).indices[:k]
    return torch.full_like(logits, -math.inf).scatter(0, top, logits[top])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest logits whose probabilities sum to at least ``p`` (Holtzman et al. 2020, section 3.1)."""
    if p >= 1:
        return logits
    sorted_logits, order = logits.sort(descending=True, stable=True)
    probs = sorted_logits.softmax(0)
    # A token stays while the sum before it is below p, so the first token always stays.
    sorted_logits = sorted_logits.masked_fill(probs.cumsum(0) - probs >= p, -math.inf)
    sorted_logits[0] = logits[order[0]]
    return torch.empty_like(logits).scatter(0, order, sorted_logits)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep logits whose probability is at least ``min_p`` times the highest (Nguyen et al. 2024, section 3)."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)


def sample_token(
    logits: Tensor, sampling_params: SamplingParams, recent_tokens: Tensor, generator: torch.Generator
) -> int:
    """Return the id of the next token, sampled by ``(vocab,)`` floating-point logits; -inf excludes a token.

    Sampling runs on the CPU, so that a seed gives the same text on any device; ``generator`` is unused if the choice is
    greedy. ``recent_tokens``, ``(length,)`` int64, are subject to the repetition penalty. Raises MemtxError if a logit
    is NaN or +inf, or all are -inf.
    """
    logits = logits.detach().float().cpu()
    if not logits.max().isfinite():  # NaN if any logit is NaN.
        raise MemtxError("The model's logits are not finite.", "Try another --dtype, or an earlier checkpoint.")
    logits = apply_repetition_penalty(logits, recent_tokens.cpu(), sampling_params.repetition_penalty)
    if sampling_params.greedy or sampling_params.temperature == 0:
        return int(logits.argmax())
    # Shifted and in float64, so that no positive temperature overflows.
    logits = (logits - logits.max()).double() / sampling_params.temperature
    logits = keep_top_p(keep_top_k(logits, sampling_params.top_k), sampling_params.top_p)
    probs = keep_min_p(logits, sampling_params.min_p).softmax(0)
    return int(torch.multinomial(probs, 1, generator=generator))
