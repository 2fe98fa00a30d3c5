"""Texts of which the word perplexity means something; without torchmetrics, whose import takes seconds."""

from __future__ import annotations

MAX_BYTES_PER_WORD = 40
"""Mean bytes per whitespace-separated word above which whitespace does not separate words, as in Chinese, Japanese or
Thai; words of Tamil and Malayalam, among the longest in UTF-8, have about 30."""

MAX_WORD_PERPLEXITY = 1e7
"""Word perplexity above which it says nothing: that of a model before it has learned words."""


def is_word_measure(num_words: float, num_bytes: float) -> bool:
    """Return whether whitespace separates the words of a text, so that its word perplexity means something."""
    return num_bytes <= MAX_BYTES_PER_WORD * num_words
