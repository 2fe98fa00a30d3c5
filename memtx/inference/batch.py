"""Which of the segments that wait are read in one call: the oldest, and those that it costs least to read beside it."""

from __future__ import annotations

from collections.abc import Sequence

from memtx.inference.scoring import Reading

CALL = 32
"""Tokens of a row that cost about as much as a call by itself does on a CPU: filling up a row by more to save one does
not pay. Measured at a model of 2.4 M parameters, one thread: a call costs 2 to 3 ms, a token 0.06 ms."""

FILLED = 0.5
"""On an accelerator, where a call costs more than its tokens, the share of the oldest's that may be filled up."""


def usual_tokens(on_cpu: bool) -> int:
    """Return how many tokens to read in one call: on a CPU more cost as much each, and what waits would wait longer."""
    return 1024 if on_cpu else 4096


def spare(width: int, on_cpu: bool) -> int:
    """Return by how many tokens rows may differ that are read together; width: tokens of the oldest."""
    return CALL if on_cpu else int(FILLED * width)


def chosen(waiting: Sequence[Reading], *, tokens: int, spare: int, padded: bool) -> list[int]:
    """Return the places of those that are read together, in order.

    Args:
        waiting: at least one, the oldest first; it is always taken, so that none waits for ever.
        tokens: of all rows, filled up, at most, where that is more than the oldest.
        spare: tokens by which rows may differ.
        padded: whether the model reads rows of different lengths. Otherwise rows may only be filled up at whose end
            nothing goes on.
    """
    first, taken = waiting[0], [0]
    width = low = high = len(first.inputs)
    # Whole logits are large: segments that ask for them are read one by one.
    alike = [place for place, one in enumerate(waiting) if not one.top and one.embeddings == first.embeddings]
    if first.top:
        return taken
    # The nearest in length go first: they are filled up least.
    for place in sorted(alike[1:], key=lambda place: abs(len(waiting[place].inputs) - width)):
        own = len(waiting[place].inputs)
        lower, higher = min(low, own), max(high, own)
        fits = padded or own == width or (waiting[place].last and own < width)
        if fits and higher - lower <= spare and (len(taken) + 1) * higher <= tokens:
            taken.append(place)
            low, high = lower, higher
    return sorted(taken)
