"""Sampling of the next token of many texts at once, on the device of the logits.

Bias and penalties come first, then temperature and filters (:mod:`memtx.inference.truncated_sampling`), as in the
``transformers`` library.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memtx.errors import MemtxError
from memtx.inference.truncated_sampling import BLOCK, draw_tokens, top_k, workspace

NO_PENALTIES = [1.0, 0.0, 0.0]


@dataclass(frozen=True)
class SamplingParams:
    """Options for choosing the next token; raises MemtxError if a value is out of range.

    Attributes:
        temperature: Divisor of the logits; 0 is greedy.
        top_k: Keep the k most likely tokens, and all that are as likely as the last of them; 0 keeps all.
        top_p: Keep the fewest tokens whose probabilities sum to at least p; 1 keeps all (Holtzman et al. 2020).
        min_p: Keep tokens whose probability is at least this fraction of the highest; 0 keeps all (Nguyen et al. 2024).
        repetition_penalty: Values above 1 make tokens of the prompt and the text less likely (CTRL, Keskar et al. 2019,
            section 4.1); 1 disables it.
        greedy: If True, take the most likely token, after bias and penalties.
        typical_p: Keep the tokens closest to the expected surprisal whose probabilities sum to p; 1 keeps all (Meister
            et al. 2023).
        presence_penalty: Subtracted from the logit of each token of the text, -2 to 2.
        frequency_penalty: Subtracted from the logit of each token of the text for each of its occurrences, -2 to 2.
        logit_bias: Numbers added to logits, by id.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 disables it)"),
            ("typical_p", 0 < self.typical_p <= 1, "above 0 and at most 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite numbers"),
        ):
            if not is_valid:
                raise MemtxError(f"{name} is {getattr(self, name)}, expected {expected}.")

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is taken."""
        return self.greedy or self.temperature == 0


class TokenCounts:
    """Occurrences of ids in a generated text that follows a prompt with these ids, for penalties."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        self._ids = np.array([*self._slots, *[0] * 64], dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)

    def add(self, token: int) -> None:
        """Count an occurrence in the text."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids, self._counts = (np.concatenate([x, np.zeros_like(x)]) for x in (self._ids, self._counts))
        self._ids[slot] = token
        self._counts[slot] += 1

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return all ids and their occurrences in the text, 0 for ids of the prompt alone; both ``(length,)``."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]


@dataclass(frozen=True)
class SamplingRow:
    """One text of a batch.

    Attributes:
        params: Options of the text.
        random: Source of random numbers of the text.
        counts: Ids subject to penalties.
        excluded: Ids that are not sampled.
        num_logprobs: Number of most likely tokens to return; None for no log-probabilities.
    """

    params: SamplingParams
    random: Random
    counts: TokenCounts = field(default_factory=TokenCounts)
    excluded: Collection[int] = ()
    num_logprobs: int | None = None


@dataclass(frozen=True)
class SampledToken:
    """A sampled id and, if requested, its log-probability and the most likely ids with theirs, best first.

    Log-probabilities are in nats, those of the model: before bias, penalties and filters, over the whole vocabulary.
    """

    token: int
    logprob: float = math.nan
    top_logprobs: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample_batch(logits: Tensor, batch: Sequence[SamplingRow], vocab_size: int) -> list[SampledToken | MemtxError]:
    """Sample a token for each row of ``(batch, vocab)`` logits; only ids below ``vocab_size`` are sampled.

    A row whose logits are not finite gives an error, and no row influences another.
    """
    logits = logits.float()
    vocab_size = min(vocab_size, logits.shape[1])
    scores = workspace("scores", len(logits), vocab_size + -vocab_size % BLOCK, logits.device)
    scores[:, :vocab_size] = logits[:, :vocab_size]
    scores[:, vocab_size:] = -math.inf
    _scatter(scores, [(row.excluded, -math.inf) for row in batch])
    is_finite = scores.amax(1).isfinite() & ~logits.amax(1).isnan()
    logprob_rows = [index for index, row in enumerate(batch) if row.num_logprobs is not None]
    is_all = len(logprob_rows) == len(batch)
    num_top = max((batch[index].num_logprobs or 0 for index in logprob_rows), default=0)
    top = log_norms = None
    part = logits if is_all else logits[logprob_rows]
    if logprob_rows:
        peak = part.amax(1, keepdim=True)
        shifted = torch.sub(part, peak, out=workspace("before", len(part), part.shape[1], part.device))
        log_norms = shifted.div_(math.log(2)).exp2_().sum(1, keepdim=True).log() + peak
    if num_top:
        # Rounded, so that equally likely tokens are chosen alike whatever the others request.
        count = min(-(-num_top // 32) * 32, vocab_size)
        top = top_k(scores if is_all else scores[logprob_rows], count)
    _apply_bias_and_penalties(scores, batch)
    tokens, is_valid = _sample(scores, batch, is_finite)
    sampled: list[SampledToken | MemtxError] = [SampledToken(token) for token in tokens]
    if log_norms is not None:
        chosen = torch.tensor([[tokens[index]] for index in logprob_rows], device=logits.device)
        logprobs = (part.gather(1, chosen) - log_norms)[:, 0].tolist()
        top_ids: list[list[int]] = top[1][:, :num_top].tolist() if top is not None else [[]] * len(logprob_rows)
        top_values = (top[0][:, :num_top] - log_norms).tolist() if top is not None else [[]] * len(logprob_rows)
        for index, logprob, ids, values in zip(logprob_rows, logprobs, top_ids, top_values, strict=True):
            pairs = [pair for pair in zip(ids, values, strict=True) if pair[1] > -math.inf]
            sampled[index] = SampledToken(tokens[index], logprob, tuple(pairs[: batch[index].num_logprobs]))
    error = MemtxError("The model's logits are not finite.", "Try another --dtype, or an earlier checkpoint.")
    return [token if valid else error for token, valid in zip(sampled, is_valid, strict=True)]


def _scatter(scores: Tensor, entries: Sequence[tuple[Collection[int], float]]) -> None:
    """Set the scores of each row's ids to its number."""
    row = np.repeat(np.arange(len(entries)), [len(ids) for ids, _ in entries])
    if len(row):
        ids = np.concatenate([np.fromiter(ids, np.int64, len(ids)) for ids, _ in entries])
        values = np.array([value for _, value in entries], dtype=np.float32)[row]
        in_range = ids < scores.shape[1]
        index = torch.from_numpy((row * scores.shape[1] + ids)[in_range]).to(scores.device)
        scores.view(-1)[index] = torch.from_numpy(values[in_range]).to(scores.device)


def _apply_bias_and_penalties(scores: Tensor, batch: Sequence[SamplingRow]) -> None:
    """Add biases, then apply the penalties, to ``(batch, length)`` scores in place."""
    width, device = scores.shape[1], scores.device

    def locate(ids: Sequence[NDArray[np.int64]], values: Sequence[NDArray[np.float32]]) -> list[Tensor]:
        """Return row numbers, indices in the flat scores, and values of all entries."""
        row = np.repeat(np.arange(len(ids)), [len(row_ids) for row_ids in ids])
        joined = np.concatenate(ids)
        arrays = (row, row * width + joined, np.concatenate(values))
        return [torch.from_numpy(array[joined < width]).to(device) for array in arrays]

    flat = scores.view(-1)
    biases = [row.params.logit_bias for row in batch]
    if any(biases):
        ids = [np.fromiter(bias, np.int64, len(bias)) for bias in biases]
        _, index, bias = locate(ids, [np.fromiter(bias.values(), np.float32, len(bias)) for bias in biases])
        flat[index] += bias
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    penalties = [[getattr(row.params, name) for name in names] for row in batch]
    if any(values != NO_PENALTIES for values in penalties):
        nothing = TokenCounts()
        counts = [
            nothing if values == NO_PENALTIES else row.counts for row, values in zip(batch, penalties, strict=True)
        ]
        row_index, index, count = locate(*zip(*(count.arrays() for count in counts), strict=True))
        repetition, frequency, presence = torch.tensor(penalties, device=device)[row_index].unbind(1)
        values = flat[index]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[index] = values - frequency * count - presence * (count > 0)


def _sample(scores: Tensor, batch: Sequence[SamplingRow], is_finite: Tensor) -> tuple[list[int], list[int]]:
    """Return the ids, and 1 for each row that is finite; the ids of others are arbitrary."""
    blocks = scores.view(len(scores), -1, BLOCK)
    block_max = blocks.amax(-1)
    best_block = block_max.argmax(1)
    arange = torch.arange(len(scores), device=scores.device)
    best = best_block * BLOCK + blocks[arange, best_block].argmax(1)
    # The device is waited for once.
    tokens, is_valid = torch.stack([best, is_finite.to(best.dtype)]).tolist()
    indices = [index for index, row in enumerate(batch) if is_valid[index] and not row.params.is_greedy]
    if indices:
        is_all = len(indices) == len(batch)
        highest = block_max.amax(1, keepdim=True)
        args = (scores, highest) if is_all else (scores[indices], highest[indices])
        params, randoms = [batch[index].params for index in indices], [batch[index].random for index in indices]
        for index, token in zip(indices, draw_tokens(*args, params, randoms), strict=True):
            tokens[index] = token
    return tokens, is_valid
