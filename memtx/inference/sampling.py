"""Choosing the next token: pure filters over logits, and one draw.

Every filter takes (vocab,) logits and returns logits of the same shape; what it rules out is -inf. At least
one token always stays.

Top-p: Holtzman et al. 2020 (section 3.1). Min-p: Nguyen et al. 2024 (section 3). Repetition penalty: Keskar et
al. 2019 (CTRL, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memtx.errors import MemtxError

NEG_INF = float("-inf")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest; 0 keeps all.
        repetition_penalty: above 1 makes recent tokens less likely; 1 leaves them.
        greedy: take the likeliest token, whatever the others say.

    Raises:
        MemtxError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        ranges = [
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0 (1 leaves all as it is)",
            ),
        ]
        for name, value, fits, expected in ranges:
            if not fits:
                raise MemtxError(f"{name} is {value}, expected {expected}.")


def apply_repetition_penalty(logits: Tensor, recent_tokens: Tensor, penalty: float) -> Tensor:
    """Make the tokens in ``recent_tokens`` less likely: positive logits are divided, negative ones multiplied.

    Args:
        logits: (vocab,) floating point.
        recent_tokens: (n,) int64, token ids; a repeated id counts once.
        penalty: above 0; 1 changes nothing.
    """
    if penalty == 1 or recent_tokens.numel() == 0:
        return logits
    chosen = logits[recent_tokens]
    return logits.scatter(0, recent_tokens, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the ``k`` largest of (vocab,) logits, of equals the first; 0 keeps all."""
    if k == 0 or k >= logits.shape[0]:
        return logits
    kept = logits.sort(descending=True, stable=True).indices[:k]
    return torch.full_like(logits, NEG_INF).scatter(0, kept, logits[kept])


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest of (vocab,) logits, likeliest first, whose probabilities add up to at least ``p``."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(0)
    # A token stays while those before it fall short of p: so the first always stays.
    ordered = ordered.masked_fill(probability.cumsum(0) - probability >= p, NEG_INF)
    ordered[0] = logits[order[0]]
    return torch.empty_like(logits).scatter(0, order, ordered)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep those of (vocab,) logits whose probability is at least ``min_p`` of the largest."""
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.max() + math.log(min_p), NEG_INF)


def sample_token(
    logits: Tensor, sampling_params: SamplingParams, recent_tokens: Tensor, generator: torch.Generator
) -> int:
    """Return the next token's id.

    The draw is made on the CPU in float32, so that a seed means the same text on every device.

    Args:
        logits: (vocab,) floating point; -inf for tokens that may never come.
        sampling_params: how to choose.
        recent_tokens: (n,) int64, the tokens that the repetition penalty looks at.
        generator: a CPU generator, advanced by one draw unless the choice is greedy.

    Raises:
        MemtxError: a logit is NaN or +inf, or none is finite.
    """
    logits = logits.detach().float().cpu()
    if not logits.max().isfinite():  # max is NaN where any is.
        raise MemtxError("The model's logits are not finite.", "Try another --dtype, or an earlier checkpoint.")
    logits = apply_repetition_penalty(logits, recent_tokens.cpu(), sampling_params.repetition_penalty)
    if sampling_params.greedy or sampling_params.temperature == 0:
        return int(logits.argmax())
    # Shifted first and in float64, so that no temperature above 0 overflows or becomes 0.
    logits = (logits - logits.max()).double() / sampling_params.temperature
    logits = keep_min_p(
        keep_top_p(keep_top_k(logits, sampling_params.top_k), sampling_params.top_p), sampling_params.min_p
    )
    return int(torch.multinomial(logits.softmax(0), 1, generator=generator))
