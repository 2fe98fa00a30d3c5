"""bAbI stories hidden in book text, as in BABILong (Weston et al. 2015; Kuratov et al. 2024, section 2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from memtx.data.babi import Story
from memtx.data.haystack import Haystack, TokenIds, encode_ids
from memtx.data.tokenizers import Tokenizer
from memtx.evaluation.accuracy import EvaluationResult, ProgressFn
from memtx.evaluation.haystack import choose_answer, read_contexts
from memtx.models.recurrent_lm import RecurrentLanguageModel


def hide_stories(
    haystack: Haystack, stories: Sequence[Story], length: int, num_samples: int, generator: torch.Generator
) -> tuple[list[Story], list[TokenIds]]:
    """Return random stories, at most ``num_samples``, and contexts that hide their facts, of those that fit.

    A context has ``length`` tokens; with a length of 0 it holds the facts alone.
    """
    samples: list[Story] = []
    contexts: list[TokenIds] = []
    for index in torch.randperm(len(stories), generator=generator).tolist():
        if len(samples) == num_samples:
            break
        facts = [encode_ids(haystack.tokenizer, f" {fact}") for fact in stories[index].facts]
        context = haystack.hide_in_order(facts, length or sum(map(len, facts)), generator)
        if context is not None:
            samples.append(stories[index])
            contexts.append(context)
    return samples, contexts


def evaluate_babi(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    haystack: Haystack,
    tasks: dict[int, list[Story]],
    lengths: Sequence[int],
    *,
    num_samples: int = 16,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> list[EvaluationResult]:
    """Return the accuracy on every task at every length; None if no story fits.

    The sentences of a story are hidden in order at random positions, and the question follows at the end. The answer is
    chosen by likelihood among all answers of the task; chance is the frequency of the most common answer.

    ``tasks`` maps task numbers to stories; ``num_samples`` is the maximum number of questions per task and length. The
    other arguments are those of :func:`~memtx.evaluation.haystack.evaluate_needle`.
    """
    generator = torch.Generator().manual_seed(seed)
    results = []
    for number, stories in tasks.items():
        counts = Counter(story.answer for story in stories)
        words = sorted(counts)
        answers = [encode_ids(tokenizer, f" {word}") for word in words]
        chance = counts.most_common(1)[0][1] / len(stories)
        for length in lengths:
            samples, contexts = hide_stories(haystack, stories, length, num_samples, generator)
            accuracy = None
            if samples:
                state = read_contexts(model, contexts, tokenizer.bos_token_id, segment_length, on_progress)
                num_correct = 0
                for index, story in enumerate(samples):
                    question = encode_ids(tokenizer, f" {story.question}")
                    choice = choose_answer(model, state.select([index]), question, answers)
                    num_correct += words[choice] == story.answer
                accuracy = num_correct / len(samples)
            results.append(EvaluationResult(f"qa{number}", length, accuracy, chance))
    return results
