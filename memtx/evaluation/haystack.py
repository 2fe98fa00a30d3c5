"""Haystack evaluation: sentences are hidden in a text, and answers about them chosen by likelihood."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from memtx.data.batch import IGNORE_INDEX
from memtx.data.haystack import Haystack, TokenIds, encode_ids
from memtx.data.tokenizers import Tokenizer
from memtx.errors import MemtxError
from memtx.evaluation.accuracy import EvaluationResult, ProgressFn
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.state import MemoryState

LOCATIONS = ("harbour", "mill", "tower", "bakery", "stable", "library", "chapel", "garden", "market", "bridge")
PASSWORDS = ("copper", "winter", "violet", "seven", "thunder", "paper", "river", "candle", "marble", "orange")


@torch.inference_mode()
def read_contexts(
    model: RecurrentLanguageModel,
    contexts: Sequence[TokenIds],
    bos_token_id: int | None,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> MemoryState:
    """Return the state after contexts of ``(length,)`` tokens, read as one batch with ``bos_token_id`` before each."""
    tokens = np.stack(contexts)
    if bos_token_id is not None:
        tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos_token_id)
    state = model.init_state(len(tokens))
    for start in range(0, tokens.shape[1], segment_length):
        segment = torch.from_numpy(tokens[:, start : start + segment_length]).to(state.position.device)
        # With labels, logits are not materialized; all labels are ignored.
        state = model(segment, state, labels=torch.full_like(segment, IGNORE_INDEX)).state
        on_progress(segment.shape[1])
    return state


@torch.inference_mode()
def choose_answer(
    model: RecurrentLanguageModel, state: MemoryState, question: TokenIds, answers: Sequence[TokenIds]
) -> int:
    """Return the index of the most likely answer to the question after ``state`` (batch size 1)."""
    device = state.position.device
    tokens = [torch.from_numpy(np.concatenate([question, answer])) for answer in answers]
    labels = [sequence.roll(-1) for sequence in tokens]
    for sequence in labels:
        sequence[: len(question) - 1] = sequence[-1] = IGNORE_INDEX
    nll = model(
        pad_sequence(tokens, batch_first=True).to(device),
        state.select([0] * len(answers)),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device),
    ).nll
    assert nll is not None
    return int(nll.double().sum(1).argmin())


def evaluate_needle(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    haystack: Haystack,
    lengths: Sequence[int],
    *,
    num_depths: int = 8,
    num_samples: int = 8,
    seed: int = 0,
    segment_length: int = 512,
    on_progress: ProgressFn = lambda _: None,
) -> list[EvaluationResult]:
    """Return the accuracy of the needle test (Kamradt 2023) at every length and depth.

    Answers are chosen by likelihood, so the test applies to any language model. Every possible answer is hidden, for a
    different location each, so remembering only that an odd word occurred gives chance accuracy.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer of the model.
        haystack: Text to hide the needles in.
        lengths: Lengths of the contexts in tokens, including needles.
        num_depths: Number of needles per context, evenly spaced, and of answers to choose from; from 2 to 10.
        num_samples: Number of contexts per length.
        seed: Seed for the choice of text, locations and passwords.
        segment_length: Tokens per call.
        on_progress: Called after every call of the model with the number of tokens it read per context.

    Raises:
        MemtxError: ``num_depths`` is out of range, or the needles do not fit into a length.
    """
    if not 2 <= num_depths <= len(PASSWORDS):
        raise MemtxError(f"num_depths is {num_depths}.", f"Give 2 to {len(PASSWORDS)}.")
    generator = torch.Generator().manual_seed(seed)
    depths = [index / (num_depths - 1) for index in range(num_depths)]

    def sample_words(words: Sequence[str]) -> list[str]:
        return [words[index] for index in torch.randperm(len(words), generator=generator)[:num_depths]]

    results = []
    for length in lengths:
        contexts, samples = [], []
        for _ in range(num_samples):
            locations, passwords = sample_words(LOCATIONS), sample_words(PASSWORDS)
            needles = [
                encode_ids(tokenizer, f" The password of the {location} is {password}.")
                for location, password in zip(locations, passwords, strict=True)
            ]
            if (context := haystack.hide(needles, depths, length, generator)) is None:
                hint = f"Give at least {sum(map(len, needles))}."
                raise MemtxError(f"{num_depths} needles do not fit into {length} tokens.", hint)
            contexts.append(context)
            samples.append((locations, [encode_ids(tokenizer, f" {password}.") for password in passwords]))
        state = read_contexts(model, contexts, tokenizer.bos_token_id, segment_length, on_progress)
        num_correct = np.zeros(num_depths)
        for index, (locations, answers) in enumerate(samples):
            sample_state = state.select([index])
            for depth, location in enumerate(locations):
                question = encode_ids(tokenizer, f" The password of the {location} is")
                num_correct[depth] += choose_answer(model, sample_state, question, answers) == depth
        results += [
            EvaluationResult(f"depth {depth:.0%}", length, float(accuracy), 1 / num_depths)
            for depth, accuracy in zip(depths, num_correct / num_samples, strict=True)
        ]
    return results
