"""Answers that a language model writes after states: the most likely tokens, for many states at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memtx.data.haystack import TokenIds
from memtx.data.tokenizers import Tokenizer
from memtx.inference.generate import GenerationConfig, TokenGenerator
from memtx.inference.sampling import SamplingParams
from memtx.models.recurrent_lm import RecurrentLanguageModel
from memtx.state import MemoryState


@torch.inference_mode()
def write_answers(
    model: RecurrentLanguageModel,
    tokenizer: Tokenizer,
    state: MemoryState,
    questions: Sequence[TokenIds],
    max_tokens: int,
    *,
    stop: Sequence[str] = (),
    segment_length: int = 512,
) -> list[str]:
    """Return the text that continues each question after its state, without sampling.

    Args:
        model: Model in eval mode.
        tokenizer: Tokenizer of the model.
        state: State of every text, batch size ``len(questions)``.
        questions: Non-empty tokens of each question, ``(length,)``.
        max_tokens: Maximum number of tokens of an answer. An end token of the model ends it.
        stop: Strings that end an answer.
        segment_length: Tokens per call while questions are read.
    """
    config = GenerationConfig(max_tokens, SamplingParams(temperature=0), tuple(stop))
    generators, states, logits = [], [], []
    for index, question in enumerate(questions):
        row_state = state.select([index])
        for start in range(0, len(question), segment_length):
            tokens = torch.from_numpy(question[None, start : start + segment_length]).to(state.position.device)
            output = model(tokens, row_state)
            row_state = output.state
        assert output.logits is not None
        generators.append(TokenGenerator(tokenizer, int(question[-1]), [], config))
        states.append(row_state)
        logits.append(output.logits[0, -1])
    answers, active = [""] * len(questions), list(range(len(questions)))
    batch_logits, state = torch.stack(logits), MemoryState.concat(states)
    while True:
        for row, index in enumerate(active):
            answers[index] += generators[index].advance(batch_logits[row]).text
        kept_rows = [row for row, index in enumerate(active) if generators[index].finish_reason is None]
        if not kept_rows:
            return answers
        active = [active[row] for row in kept_rows]
        next_tokens = [[generators[index].next_token] for index in active]
        output = model(torch.tensor(next_tokens, device=state.position.device), state.select(kept_rows))
        assert output.logits is not None
        batch_logits, state = output.logits[:, -1], output.state
