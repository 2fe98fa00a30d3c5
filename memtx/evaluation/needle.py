"""Needles in a book: sentences planted at several depths of a real text, each asked for at the end.

After the test of Kamradt (2023), with an answer that is chosen by likelihood, so that any language model can be asked.
All that can be chosen is planted, each behind another name: who only knows which words were odd is at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.evaluation.haystack import Haystack, encoded
from memtx.evaluation.likelihood import likeliest, read
from memtx.evaluation.measured import Measured
from memtx.models.memory_transformer import MemoryTransformer

NAMES = ("harbour", "mill", "tower", "bakery", "stable", "library", "chapel", "garden", "market", "bridge")
WORDS = ("copper", "winter", "violet", "seven", "thunder", "paper", "river", "candle", "marble", "orange")


def needles(
    model: MemoryTransformer,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    *,
    depths: int = 8,
    rows: int = 8,
    seed: int = 0,
    segment: int = 512,
    watch: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Return the accuracy at every length and depth.

    Args:
        model: in eval mode, of this tokenizer.
        tokenizer: the model's.
        haystack: the text.
        lengths: tokens of a context, needles included.
        depths: needles in a context, from 2 to 10, spread evenly from its beginning to its end; as many answers can
            be chosen.
        rows: contexts of a length.
        seed: of the choice of text, names and words.
        segment: tokens a call.
        watch: is told how many tokens of a row were read.

    Raises:
        MemtxError: a number of depths that is not possible, or a length into which the needles do not fit.
    """
    if not 2 <= depths <= len(WORDS):
        raise MemtxError(f"There are {depths} depths.", f"Give 2 to {len(WORDS)}.")
    generator = torch.Generator().manual_seed(seed)
    places = [number / (depths - 1) for number in range(depths)]
    results = []
    for length in lengths:
        contexts, asked = [], []
        for _ in range(rows):
            names = [NAMES[one] for one in torch.randperm(len(NAMES), generator=generator)[:depths]]
            words = [WORDS[one] for one in torch.randperm(len(WORDS), generator=generator)[:depths]]
            facts = [
                encoded(tokenizer, f" The password of the {name} is {word}.")
                for name, word in zip(names, words, strict=True)
            ]
            context = haystack.hiding(facts, places, length, generator)
            if context is None:
                raise MemtxError(
                    f"{depths} needles do not fit into {length} tokens.", f"Give at least {sum(map(len, facts))}."
                )
            contexts.append(context)
            asked.append((names, [encoded(tokenizer, f" {word}.") for word in words]))
        state = read(model, contexts, tokenizer.begin, segment=segment, watch=watch)
        right = np.zeros(depths)
        for row, (names, answers) in enumerate(asked):
            own = state.select([row])
            for depth, name in enumerate(names):
                question = encoded(tokenizer, f" The password of the {name} is")
                right[depth] += likeliest(model, own, question, answers) == depth
        results += [
            Measured(f"depth {place:.0%}", length, float(share), 1 / depths)
            for place, share in zip(places, right / rows, strict=True)
        ]
    return results
