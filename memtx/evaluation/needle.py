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
from memtx.evaluation.haystack import Haystack, encode_ids
from memtx.evaluation.likelihood import choose_answer, read_contexts
from memtx.evaluation.results import EvaluationResult
from memtx.models.memory_transformer import MemoryTransformer

LOCATIONS = ("harbour", "mill", "tower", "bakery", "stable", "library", "chapel", "garden", "market", "bridge")
PASSWORDS = ("copper", "winter", "violet", "seven", "thunder", "paper", "river", "candle", "marble", "orange")


def evaluate_needle(
    model: MemoryTransformer,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    *,
    num_depths: int = 8,
    num_samples: int = 8,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> list[EvaluationResult]:
    """Return the accuracy at every length and depth.

    Args:
        model: in eval mode, of this tokenizer.
        tokenizer: the model's.
        haystack: the text.
        lengths: tokens of a context, needles included.
        num_depths: needles in a context, from 2 to 10, spread evenly from its beginning to its end; as many answers can
            be chosen.
        num_samples: contexts of a length.
        seed: of the choice of text, names and words.
        segment_length: tokens a call.
        on_progress: is told how many tokens of a row were read.

    Raises:
        MemtxError: a number of depths that is not possible, or a length into which the needles do not fit.
    """
    if not 2 <= num_depths <= len(PASSWORDS):
        raise MemtxError(f"There are {num_depths} depths.", f"Give 2 to {len(PASSWORDS)}.")
    generator = torch.Generator().manual_seed(seed)
    places = [number / (num_depths - 1) for number in range(num_depths)]
    results = []
    for length in lengths:
        contexts, asked = [], []
        for _ in range(num_samples):
            names = [LOCATIONS[one] for one in torch.randperm(len(LOCATIONS), generator=generator)[:num_depths]]
            words = [PASSWORDS[one] for one in torch.randperm(len(PASSWORDS), generator=generator)[:num_depths]]
            facts = [
                encode_ids(tokenizer, f" The password of the {name} is {word}.")
                for name, word in zip(names, words, strict=True)
            ]
            context = haystack.hide(facts, places, length, generator)
            if context is None:
                raise MemtxError(
                    f"{num_depths} needles do not fit into {length} tokens.", f"Give at least {sum(map(len, facts))}."
                )
            contexts.append(context)
            asked.append((names, [encode_ids(tokenizer, f" {word}.") for word in words]))
        state = read_contexts(
            model, contexts, tokenizer.bos_token_id, segment_length=segment_length, on_progress=on_progress
        )
        right = np.zeros(num_depths)
        for row, (names, answers) in enumerate(asked):
            own = state.select([row])
            for depth, name in enumerate(names):
                question = encode_ids(tokenizer, f" The password of the {name} is")
                right[depth] += choose_answer(model, own, question, answers) == depth
        results += [
            EvaluationResult(f"depth {place:.0%}", length, float(share), 1 / num_depths)
            for place, share in zip(places, right / num_samples, strict=True)
        ]
    return results
