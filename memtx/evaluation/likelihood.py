"""Which of several answers a language model finds likeliest, after a context that is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from memtx.data.batch import IGNORE_INDEX
from memtx.evaluation.haystack import TokenIds
from memtx.models.memory_transformer import MemoryTransformer
from memtx.state import MemoryState


@torch.inference_mode()
def read_contexts(
    model: MemoryTransformer,
    contexts: Sequence[TokenIds],
    bos_token_id: int,
    *,
    segment_length: int = 512,
    on_progress: Callable[[int], None] | None = None,
) -> MemoryState:
    """Return the state after contexts of one length, a row each.

    Args:
        model: in eval mode.
        contexts: each (tokens,).
        bos_token_id: the token that stands before each.
        segment_length: tokens a call.
        on_progress: is told after every call how many tokens of a row it read.
    """
    rows = np.stack([np.concatenate([[bos_token_id], one]) for one in contexts])
    state = model.init_state(len(rows))
    for at in range(0, rows.shape[1], segment_length):
        part = torch.from_numpy(rows[:, at : at + segment_length]).to(state.position.device)
        # With labels no logits are made, and there is nothing to be scored.
        state = model(part, state, labels=torch.full_like(part, IGNORE_INDEX)).state
        if on_progress is not None:
            on_progress(part.shape[1])
    return state


@torch.inference_mode()
def choose_answer(model: MemoryTransformer, state: MemoryState, question: TokenIds, answers: Sequence[TokenIds]) -> int:
    """Return the number of the answer whose tokens together are likeliest.

    Args:
        model: in eval mode.
        state: of one row, after the context; it is left as it was, so that others can be asked.
        question: (tokens,), at least one.
        answers: each (tokens,).
    """
    width = len(question) + max(map(len, answers))
    tokens = np.zeros((len(answers), width), dtype=np.int64)
    labels = np.full((len(answers), width), IGNORE_INDEX, dtype=np.int64)
    for row, answer in enumerate(answers):
        whole = np.concatenate([question, answer])
        tokens[row, : len(whole)] = whole
        labels[row, len(question) - 1 : len(whole) - 1] = answer
    device = state.position.device
    forked = state.select([0] * len(answers))
    nll = model(torch.from_numpy(tokens).to(device), forked, labels=torch.from_numpy(labels).to(device)).nll
    assert nll is not None
    return int(nll.double().sum(1).argmin())
