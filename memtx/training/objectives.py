"""Pretraining objectives as functions of tokens: masked and permuted language modeling.

The causal objective needs no function, because batches of text have the next tokens as labels.
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
    """Positions of tokens within words.

    Attributes:
        continues_word: ``(vocab,)`` bool, True if a token begins with a letter or digit, so that it continues the word
            of a preceding token that ends in one.
        ends_in_word: ``(vocab,)`` bool, True if a token ends with a letter or digit.
    """

    continues_word: Tensor
    ends_in_word: Tensor


def find_word_boundaries(tokenizer: Tokenizer) -> WordBoundaries:
    """Return the word boundaries of a trained tokenizer's tokens."""

    def is_letter(byte: int) -> bool:
        # Parts of characters beyond ASCII count as letters.
        return byte >= 0x80 or chr(byte).isalnum()

    contents = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    continues_word = torch.tensor([bool(content) and is_letter(content[0]) for content in contents])
    ends_in_word = torch.tensor([bool(content) and is_letter(content[-1]) for content in contents])
    return WordBoundaries(continues_word, ends_in_word)


def compute_word_ids(tokens: Tensor, boundaries: WordBoundaries) -> Tensor:
    """Return the index of each token's word in its text, ``(batch, length)`` int64."""
    continues_word = boundaries.continues_word[tokens]
    continues_word[:, 1:] &= boundaries.ends_in_word[tokens[:, :-1]]
    continues_word[:, 0] = False
    word_ids: Tensor = (~continues_word).cumsum(1) - 1
    return word_ids


class MaskedTokens(NamedTuple):
    """Tokens ``(batch, length)``, some of them masked, and labels ``(batch, length)``, ``IGNORE_INDEX`` elsewhere."""

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
    """Select tokens to predict and mask them (BERT, Devlin et al. 2019, section 3.1).

    Of the selected tokens, 80% become ``mask_token_id``, 10% become a random token, and 10% stay.

    Args:
        tokens: ``(batch, length)`` int64.
        mask_token_id: Id of the mask token.
        vocab_size: Random tokens are sampled below it.
        mask_prob: Probability that a token, or a word if ``word_boundaries`` is given, is selected.
        special_token_ids: Ids that are never selected, such as the one that begins a document.
        word_boundaries: Word boundaries of the tokens, to select whole words.
        generator: Random number generator on the tokens' device. Defaults to torch's own.

    Raises:
        MemtxError: ``mask_prob`` is not between 0 and 1.
    """
    if not 0.0 < mask_prob < 1.0:
        raise MemtxError(f"mask_prob is {mask_prob}.", "Choose a probability between 0 and 1, such as 0.15.")

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    selected = uniform() < mask_prob
    if word_boundaries is not None:
        # All tokens of a word share one random number.
        selected = selected.gather(1, compute_word_ids(tokens, word_boundaries))
    for token_id in special_token_ids:
        selected &= tokens != token_id
    labels = torch.where(selected, tokens, IGNORE_INDEX)
    replacement = uniform()
    random_tokens = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    masked = torch.where(selected & (replacement < 0.8), mask_token_id, tokens)
    return MaskedTokens(torch.where(selected & (replacement >= 0.9), random_tokens, masked), labels)


class PermutedTokens(NamedTuple):
    """A factorization order: rank of each position and labels of the last, ``IGNORE_INDEX`` elsewhere.

    Both are ``(batch, length)``.
    """

    rank: Tensor
    labels: Tensor


def sample_permutation(
    tokens: Tensor,
    *,
    predict_fraction: float = 1 / 6,
    special_token_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> PermutedTokens:
    """Sample a factorization order and select its last positions (XLNet, Yang et al. 2019, sections 2.2 and 2.3).

    Args:
        tokens: ``(batch, length)`` int64.
        predict_fraction: Fraction of the positions to predict, 1 / K in the paper.
        special_token_ids: Ids that are never predicted.
        generator: Random number generator on the tokens' device. Defaults to torch's own.

    Raises:
        MemtxError: ``predict_fraction`` is not between 0 and 1.
    """
    if not 0.0 < predict_fraction < 1.0:
        raise MemtxError(f"predict_fraction is {predict_fraction}.", "Choose a fraction between 0 and 1, such as 0.17.")
    order = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(1)
    rank = order.argsort(1)
    predicted = rank >= tokens.shape[1] - max(1, round(predict_fraction * tokens.shape[1]))
    for token_id in special_token_ids:
        predicted &= tokens != token_id
    return PermutedTokens(rank, torch.where(predicted, tokens, IGNORE_INDEX))
