"""What is to be guessed of a text: masked tokens, or tokens in an order drawn at random. Functions of tokens alone.

The causal objective needs no function: labels are the tokens that follow, as the data has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from memtx.data.batch import IGNORED
from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError


class WordEdges(NamedTuple):
    """Which tokens are within words.

    Attributes:
        goes_on: (vocab,) bool, whether a token begins with a letter or digit, so that it goes on with a word if the
            token before ends within one.
        stays: (vocab,) bool, whether a token ends with a letter or digit.
    """

    goes_on: Tensor
    stays: Tensor


def word_edges(tokenizer: Tokenizer) -> WordEdges:
    """Return the edges of a fitted tokenizer's tokens, bytes or byte pairs."""

    def within(byte: int) -> bool:
        # Parts of characters beyond ASCII count as letters.
        return byte >= 0x80 or chr(byte).isalnum()

    contents = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    goes_on = torch.tensor([bool(content) and within(content[0]) for content in contents])
    stays = torch.tensor([bool(content) and within(content[-1]) for content in contents])
    return WordEdges(goes_on, stays)


def words_in(tokens: Tensor, edges: WordEdges) -> Tensor:
    """Return (rows, length) int64, the number of the word that each token is of, counted from 0 in each row."""
    goes_on = edges.goes_on[tokens]
    goes_on[:, 1:] &= edges.stays[tokens[:, :-1]]
    goes_on[:, 0] = False
    numbers: Tensor = (~goes_on).cumsum(1) - 1
    return numbers


class Masked(NamedTuple):
    """Tokens (rows, length) with some hidden, and labels (rows, length): the hidden ones, ``IGNORED`` elsewhere."""

    tokens: Tensor
    labels: Tensor


def masked(
    tokens: Tensor,
    *,
    mask: int,
    vocab_size: int,
    share: float = 0.15,
    kept: Iterable[int] = (),
    edges: WordEdges | None = None,
    generator: torch.Generator | None = None,
) -> Masked:
    """Hide tokens to be guessed (BERT, Devlin et al. 2019, section 3.1).

    Of those chosen 80% become ``mask``, 10% a token drawn at random, and 10% stay.

    Args:
        tokens: (rows, length) int64.
        mask: the id that stands for a hidden token.
        vocab_size: random tokens are drawn below it.
        share: probability of each token, or of each word where edges are given, to be chosen.
        kept: ids that are never chosen, such as what begins a document.
        edges: of words, to choose whole words.
        generator: draws, on the tokens' device; torch's own by default.

    Raises:
        MemtxError: share is not between 0 and 1.
    """
    if not 0.0 < share < 1.0:
        raise MemtxError(f"share is {share}.", "Give a probability between 0 and 1, such as 0.15.")

    def draw() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    chosen = draw() < share
    if edges is not None:
        # A word is chosen by what was drawn at its first token.
        chosen = chosen.gather(1, _first_of_word(words_in(tokens, edges)))
    for one in kept:
        chosen &= tokens != one
    labels = torch.where(chosen, tokens, IGNORED)
    how = draw()
    other = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    hidden = torch.where(chosen & (how < 0.8), mask, tokens)
    return Masked(torch.where(chosen & (how >= 0.9), other, hidden), labels)


def _first_of_word(words: Tensor) -> Tensor:
    """Return (rows, length), the place of the first token of each token's word."""
    place = torch.arange(words.shape[1], device=words.device).expand_as(words)
    begins = torch.ones_like(words, dtype=torch.bool)
    begins[:, 1:] = words[:, 1:] != words[:, :-1]
    return torch.where(begins, place, 0).cummax(1).values


class Permuted(NamedTuple):
    """``rank`` (rows, length): when a place is read; ``labels`` (rows, length): those read last, else ``IGNORED``."""

    rank: Tensor
    labels: Tensor


def permuted(
    tokens: Tensor,
    *,
    share: float = 1 / 6,
    kept: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> Permuted:
    """Draw the order in which a text is read, and what of it is guessed (XLNet, Yang et al. 2019, sections 2.2, 2.3).

    Args:
        tokens: (rows, length) int64.
        share: of places that are guessed, the last of the order (1 / K of the article).
        kept: ids that are never guessed.
        generator: draws, on the tokens' device; torch's own by default.

    Raises:
        MemtxError: share is not between 0 and 1.
    """
    if not 0.0 < share < 1.0:
        raise MemtxError(f"share is {share}.", "Give a share between 0 and 1, such as 0.17.")
    order = torch.rand(tokens.shape, generator=generator, device=tokens.device).argsort(1)
    rank = order.argsort(1)
    last = rank >= tokens.shape[1] - max(1, round(share * tokens.shape[1]))
    for one in kept:
        last &= tokens != one
    return Permuted(rank, torch.where(last, tokens, IGNORED))
