"""Which of the segments that wait are read in one call: the oldest, and those that it costs least to read beside it."""

from __future__ import annotations

from collections.abc import Sequence

from memtx.inference.scoring import ScoreRequest

CPU_CALL_COST_TOKENS = 32
"""Tokens of a row that cost about as much as a call by itself does on a CPU: filling up a row by more to save one does
not pay. Measured at a model of 2.4 M parameters, one thread: a call costs 2 to 3 ms, a token 0.06 ms."""

MAX_PADDING_RATIO = 0.5
"""On an accelerator, where a call costs more than its tokens, the share of the oldest's that may be filled up."""


def default_batch_tokens(is_cpu: bool) -> int:
    """Return how many tokens to read in one call: on a CPU more cost as much each, and what waits would wait longer."""
    return 1024 if is_cpu else 4096


def padding_limit(length: int, is_cpu: bool) -> int:
    """Return by how many tokens rows may differ that are read together; length: tokens of the oldest."""
    return CPU_CALL_COST_TOKENS if is_cpu else int(MAX_PADDING_RATIO * length)


def select_batch(
    requests: Sequence[ScoreRequest], *, max_tokens: int, max_padding: int, supports_padding: bool
) -> list[int]:
    """Return the places of those that are read together, in order.

    Args:
        requests: at least one, the oldest first; it is always taken, so that none waits for ever.
        max_tokens: of all rows, filled up, at most, where that is more than the oldest.
        max_padding: tokens by which rows may differ.
        supports_padding: whether the model reads rows of different lengths. Otherwise rows may only be filled up at
            whose end nothing goes on.
    """
    first, taken = requests[0], [0]
    width = low = high = len(first.tokens)
    # Whole logits are large: segments that ask for them are read one by one.
    alike = [
        place
        for place, one in enumerate(requests)
        if not one.num_logprobs and one.return_hidden_states == first.return_hidden_states
    ]
    if first.num_logprobs:
        return taken
    # The nearest in length go first: they are filled up least.
    for place in sorted(alike[1:], key=lambda place: abs(len(requests[place].tokens) - width)):
        own = len(requests[place].tokens)
        lower, higher = min(low, own), max(high, own)
        fits = supports_padding or own == width or (requests[place].discard_state and own < width)
        if fits and higher - lower <= max_padding and (len(taken) + 1) * higher <= max_tokens:
            taken.append(place)
            low, high = lower, higher
    return sorted(taken)
