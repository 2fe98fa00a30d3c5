"""Masked language modeling as a function of tokens; the causal objective needs none, since batches have labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.errors import MemtxError


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
    word_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Select tokens to predict and mask them (BERT, Devlin et al. 2019, section 3.1).

    Of the selected tokens, 80% become ``mask_token_id``, 10% become a random token, and 10% stay.

    Args:
        tokens: ``(batch, length)`` int64.
        mask_token_id: Id of the mask token.
        vocab_size: Random tokens are sampled below it.
        mask_prob: Probability that a token, or a word if ``word_ids`` is given, is selected.
        special_token_ids: Ids that are never selected, such as the one that begins a document.
        word_ids: Index of each token's word in its text, ``(batch, length)`` int64, to select whole words.
        token_weights: Relative probability of each id to be selected, ``(ids,)``. If given, a fixed share of the batch
            is selected, ``mask_prob`` of its tokens rounded up, as for DistilBERT (Sanh et al. 2019).
        generator: Random number generator on the tokens' device. Defaults to torch's own.

    Raises:
        MemtxError: ``mask_prob`` is not between 0 and 1.
    """
    if not 0.0 < mask_prob < 1.0:
        raise MemtxError(f"mask_prob is {mask_prob}.", "Choose a probability between 0 and 1, such as 0.15.")

    def uniform() -> Tensor:
        return torch.rand(tokens.shape, generator=generator, device=tokens.device)

    selectable = torch.ones_like(tokens, dtype=torch.bool)
    for token_id in special_token_ids:
        selectable &= tokens != token_id
    if token_weights is not None:
        weights = torch.where(selectable, token_weights[tokens], 0.0).flatten()
        count = min(math.ceil(mask_prob * tokens.numel()), int(weights.count_nonzero()))
        selected = torch.zeros_like(weights, dtype=torch.bool)
        if count:
            selected[weights.multinomial(count, generator=generator)] = True
        selected = selected.view_as(tokens)
    else:
        selected = uniform() < mask_prob
        if word_ids is not None:
            # All tokens of a word share one random number.
            selected = selected.gather(1, word_ids)
        selected &= selectable
    labels = torch.where(selected, tokens, IGNORE_INDEX)
    replacement = uniform()
    random_tokens = torch.randint(vocab_size, tokens.shape, generator=generator, device=tokens.device)
    masked = torch.where(selected & (replacement < 0.8), mask_token_id, tokens)
    return MaskedTokens(torch.where(selected & (replacement >= 0.9), random_tokens, masked), labels)
