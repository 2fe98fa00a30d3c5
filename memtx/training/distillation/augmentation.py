"""Data augmentation of task distillation: words of a text replaced by likely and similar ones (TinyBERT).

Jiao et al. 2020, appendix A, algorithm 1. As in the authors' code the candidates of a word come from the original text,
and neither stop words nor words with other characters than letters are replaced.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memtx.data.hf_tokenizers import HFTokenizer
from memtx.data.tasks.base import build_inputs
from memtx.errors import DataError, MemtxError, check_at_least
from memtx.models.encoder import Encoder
from memtx.training.distillation.word_vectors import WORD, Neighbors, WordVectors, find_words

_STOP_WORDS = """
a about above after again all also am an and any are aren as at be because been before being below between both but by
can couldn d did didn do does doesn doing don down during each few for from further had hadn has hasn have haven having
he her here hers herself him himself his how i if in into is isn it its itself just ll m me more most must mustn my
myself needn no nor not now o of off on once only or other our ours ourselves out over own re s same she should shouldn
so some such t than that the their theirs them themselves then there these they this those through to too under until up
ve very was wasn we were weren what when where which while who whom why will with won would wouldn you your yours
yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Function words, which carry grammar or negation and are never replaced."""

AUGMENTED_FIELDS = ("text", "text_a", "text_b")
POSITIONAL_FIELDS = ("answers", "context", "summary", "target", "choices")
"""Fields of examples whose labels depend on the wording of a text."""


@dataclass(frozen=True)
class _MaskedWord:
    """A word whose candidates the encoder predicts: its place among the words, and the masked window around it."""

    word: int
    tokens: NDArray[np.int64]
    position: int


class Augmenter:
    """Replaces words of texts at random (TinyBERT, Jiao et al. 2020, algorithm 1).

    Args:
        model: Encoder with a head for masked tokens; put into eval mode.
        tokenizer: Its tokenizer.
        neighbors: Finds candidates for words of several pieces. Defaults to the nearest embeddings of the encoder.
        replace_prob: Probability p_t that a word is replaced. Defaults to 0.4.
        num_variants: Variants N_a of a text; equal ones are left out. Defaults to 20.
        num_candidates: Candidates K of a word. Defaults to 15.
        max_length: Maximum tokens that the encoder reads at once, with special tokens. Defaults to 512.
        batch_size: Masked texts that the encoder reads at once. Defaults to 32.

    Raises:
        MemtxError: A number is out of range, or the encoder has no head for masked tokens.
    """

    def __init__(
        self,
        model: Encoder,
        tokenizer: HFTokenizer,
        neighbors: Neighbors | None = None,
        *,
        replace_prob: float = 0.4,
        num_variants: int = 20,
        num_candidates: int = 15,
        max_length: int = 512,
        batch_size: int = 32,
    ) -> None:
        if not 0.0 < replace_prob <= 1.0:
            raise MemtxError(f"replace_prob is {replace_prob}.", "Give a number above 0 and at most 1, such as 0.4.")
        check_at_least(1, num_variants=num_variants, num_candidates=num_candidates, batch_size=batch_size)
        check_at_least(8, max_length=max_length)
        if model.head is None:
            raise MemtxError("The model has no head for masked tokens.", "Give a model of masked language modeling.")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.neighbors = neighbors if neighbors is not None else WordVectors.from_encoder(model, tokenizer)
        self.replace_prob, self.num_variants, self.num_candidates = replace_prob, num_variants, num_candidates
        self.max_length, self.batch_size = max_length, batch_size
        self._is_word = torch.from_numpy(find_words(tokenizer))

    def augment(self, text: str, rng: random.Random) -> list[str]:
        """Return distinct variants of a text, at most ``num_variants``."""
        spans = [match.span() for match in WORD.finditer(text)]
        variants = self._sample([text[start:stop] for start, stop in spans], self.find_candidates(text, spans), rng)
        results = []
        for words in variants:
            parts, end = [], 0
            for (start, stop), word in zip(spans, words, strict=True):
                parts += [text[end:start], word]
                end = stop
            results.append("".join(parts) + text[end:])
        return results

    def augment_words(self, words: Sequence[str], rng: random.Random) -> list[list[str]]:
        """Return distinct variants of a list of words, each as long as the list."""
        spans, start = [], 0
        for word in words:
            spans.append((start, start + len(word)))
            start += len(word) + 1
        return self._sample(words, self.find_candidates(" ".join(words), spans), rng)

    def augment_record(self, record: Mapping[str, Any], rng: random.Random) -> list[dict[str, Any]]:
        """Return variants of the fields of an example: of its text, of each of two texts, or of its words.

        Raises:
            DataError: The labels depend on the wording, or there is no text.
        """
        if positional := [name for name in POSITIONAL_FIELDS if name in record]:
            message = f"Examples with '{positional[0]}' cannot be augmented: it depends on the words of the text."
            raise DataError(message, "Augment texts or pairs with a label, or words with tags.")
        if isinstance(words := record.get("tokens"), list):
            return [{**record, "tokens": variant} for variant in self.augment_words(words, rng)]
        names = [name for name in AUGMENTED_FIELDS if isinstance(record.get(name), str)]
        if not names:
            raise DataError(f"There is no text in {list(record)}.", f"Use {', '.join(AUGMENTED_FIELDS)} or tokens.")
        return [{**record, name: variant} for name in names for variant in self.augment(record[name], rng)]

    def find_candidates(self, text: str, spans: Sequence[tuple[int, int]]) -> list[list[str]]:
        """Return the candidates for the words at these characters of a text; empty for words that are never replaced.

        A word of one piece is masked, and its candidates are the likeliest words; others have the nearest ones.
        """
        (encoding,) = self.tokenizer.encode_with_offsets([text])
        first, last = encoding.offsets[:, 0], encoding.offsets[:, 1]
        candidates: list[list[str]] = [[] for _ in spans]
        masked: list[_MaskedWord] = []
        for index, (start, stop) in enumerate(spans):
            word = text[start:stop]
            if WORD.fullmatch(word) is None or word.lower() in STOP_WORDS:
                continue
            pieces = np.flatnonzero((first < stop) & (last > start))
            if len(pieces) == 1 and encoding.ids[pieces[0]] != self.tokenizer.unk_token_id:
                masked.append(_MaskedWord(index, *self._mask(encoding.ids, int(pieces[0]))))
            else:
                candidates[index] = self.neighbors.find(word, self.num_candidates)
        for index, words in self._predict(masked):
            candidates[index] = words
        is_title = [text[start:stop].istitle() for start, stop in spans]
        return [
            [word.title() for word in words] if title else words
            for title, words in zip(is_title, candidates, strict=True)
        ]

    def _mask(self, ids: NDArray[np.int64], position: int) -> tuple[NDArray[np.int64], int]:
        """Return the framed window around a token with that token masked, and its position there."""
        length = self.max_length - 2
        start = max(0, min(position - length // 2, len(ids) - length))
        window = ids[start : start + length].copy()
        window[position - start] = self.tokenizer.mask_token_id
        tokens, *_ = build_inputs(self.tokenizer, window)
        return tokens, position - start + 1

    @torch.inference_mode()
    def _predict(self, masked: Sequence[_MaskedWord]) -> Iterator[tuple[int, list[str]]]:
        """Yield the index of each masked word and the likeliest words at its place."""
        device = self.model.embedding.word_embeddings.weight.device
        for start in range(0, len(masked), self.batch_size):
            batch = masked[start : start + self.batch_size]
            length = max(len(item.tokens) for item in batch)
            tokens = np.full((len(batch), length), self.tokenizer.pad_token_id, dtype=np.int64)
            is_token, is_masked = (np.zeros(tokens.shape, dtype=bool) for _ in range(2))
            for row, item in enumerate(batch):
                tokens[row, : len(item.tokens)], is_token[row, : len(item.tokens)] = item.tokens, True
                is_masked[row, item.position] = True
            inputs: list[Tensor] = [torch.from_numpy(array).to(device) for array in (tokens, is_token, is_masked)]
            logits = self.model(inputs[0], inputs[1].long(), logits_mask=inputs[2]).logits
            assert logits is not None
            logits = logits.float()[:, : len(self._is_word)].cpu().masked_fill(~self._is_word, -torch.inf)
            count = min(self.num_candidates, int(self._is_word.sum()))
            for item, best in zip(batch, logits.topk(count).indices.tolist(), strict=True):
                yield item.word, [self.tokenizer.decode([token]).strip() for token in best]

    def _sample(self, words: Sequence[str], candidates: Sequence[Sequence[str]], rng: random.Random) -> list[list[str]]:
        variants, seen = [], {tuple(words)}
        for _ in range(self.num_variants):
            variant = [
                rng.choice(others) if others and rng.random() < self.replace_prob else word
                for word, others in zip(words, candidates, strict=True)
            ]
            if tuple(variant) not in seen:
                seen.add(tuple(variant))
                variants.append(variant)
        return variants
