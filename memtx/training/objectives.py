"""What is to be guessed of a text: masked tokens, or tokens in an order drawn at random. Functions of tokens alone.

The causal objective needs no function: labels are the tokens that follow, as the data has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError


class WordBoundaries(NamedTuple):
    """Which tokens are within words.

    Attributes:
        continues_word: (vocab,) bool, whether a token begins with a letter or digit, so that it goes on with a word if
            the token before ends within one.
        ends_in_word: (vocab,) bool, whether a token ends with a letter or digit.
    """

    continues_word: Tensor
    ends_in_word: Tensor


def find_word_boundaries(tokenizer: Tokenizer) -> WordBoundaries:
    """Return the edges of a fitted tokenizer's tokens, bytes or byte pairs."""

    def within(byte: int) -> bool:
        # Parts of characters beyond ASCII count as letters.
        return byte >= 0x80 or chr(byte).isalnum()

    contents = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    goes_on = torch.tensor([bool(content) and within(content[0]) for content in contents])
    stays = torch.tensor([bool(content) and within(content[-1]) for content in contents])
    return WordBoundaries(goes_on, stays)


def compute_word_ids(tokens: Tensor, boundaries: WordBoundaries) -> Tensor:
    """Return (rows, length) int64, the number of the word that each token is of, counted from 0 in each row."""
    goes_on = boundaries.continues_word[tokens]
    goes_on[:, 1:] &= boundaries.ends_in_word[tokens[:, :-1]]
    goes_on[:, 0] = False
    numbers: Tensor = (~goes_on).cumsum(1) - 1
    return numbers


class MaskedTokens(NamedTuple):
    """Tokens (rows, length) with some hidden, and labels (rows, length): hidden ones, else ``IGNORE_INDEX``."""

    tokens: Tensor
    labels: Tensor


def mask_tokens(
    tokens: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    mask_prob: float = 0.15,
    special_token_ids: Iterable[int] = (),
    word_boundaries: WordBoundaries | None = None,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Hide tokens to be guessed (BERT, Devlin et al. 2019, section 3.1).

    Of those chosen 80% become ``mask_token_id``, 10% a token drawn at random, and 10% stay.

    Args:
        tokens: (rows, length) int64.
        mask_token_id: the id that stands for a hidden token.
        vocab_size: random tokens are drawn below it.
        mask_prob: probability of each token, or of each word where edges are given, to be chosen.
        special_token_ids: ids that are never chosen, such as what begins a document.
        word_boundaries: of words, to choose whole words.
        generator: draws, on the tokens' device; torch's own by default.

    Raises:
        MemtxError: mask_prob is not between 0 and 1.
    """
    if not 0.0 < mask_prob < 1.0:
        raise MemtxError(f"mask_prob is {mask_prob}.", "Give a probability between 0 and 1, such as 0.15.")

    def draw() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    chosen = draw() < mask_prob
    if word_boundaries is not None:
        # A word is chosen by what was drawn at its first token.
        chosen = chosen.gather(1, _find_word_starts(compute_word_ids(tokens, word_boundaries)))
    for one in special_token_ids:
        chosen &= tokens != one
    labels = torch.where(chosen, tokens, IGNORE_INDEX)
    how = draw()
    other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    hidden = torch.where(chosen & (how < 0.8), mask_token_id, tokens)
    return MaskedTokens(torch.where(chosen & (how >= 0.9), other, hidden), labels)


def _find_word_starts(word_ids: Tensor) -> Tensor:
    """Return (rows, length), the place of the first token of each token's word."""
    place = torch.arange(word_ids.shape[1], device=word_ids.device).expand_as(word_ids)
    begins = torch.ones_like(word_ids, dtype=torch.bool)
    begins[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
    return torch.where(begins, place, 0).cummax(1).values


class PermutedTokens(NamedTuple):
    """``rank`` (rows, length): when a place is read; ``labels`` (rows, length): the last, else ``IGNORE_INDEX``."""

    rank: Tensor
    labels: Tensor


def sample_permutation(
    tokens: Tensor,
    *,
    predict_fraction: float = 1 / 6,
    special_token_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> PermutedTokens:
    """Draw the order in which a text is read, and what of it is guessed (XLNet, Yang et al. 2019, sections 2.2, 2.3).

    Args:
        tokens: (rows, length) int64.
        predict_fraction: of places that are guessed, the last of the order (1 / K of the article).
        special_token_ids: ids that are never guessed.
        generator: draws, on the tokens' device; torch's own by default.

    Raises:
        MemtxError: predict_fraction is not between 0 and 1.
    """
    if not 0.0 < predict_fraction < 1.0:
        raise MemtxError(f"predict_fraction is {predict_fraction}.", "Give a share between 0 and 1, such as 0.17.")
    order = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(1)
    rank = order.argsort(1)
    last = rank >= tokens.shape[1] - max(1, round(predict_fraction * tokens.shape[1]))
    for one in special_token_ids:
        last &= tokens != one
    return PermutedTokens(rank, torch.where(last, tokens, IGNORE_INDEX))
