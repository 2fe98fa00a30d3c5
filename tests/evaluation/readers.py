"""Fake models that answer from text they remember, so that evaluation results are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.state import MemoryState


@dataclass
class Output:
    nll: Tensor
    state: MemoryState


class RememberingModel:
    """Remembers the last ``reach`` bytes; an answer has zero loss if they contain the question followed by it."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.num_tokens_read = 0

    def init_state(self, batch_size: int) -> MemoryState:
        text = torch.zeros(batch_size, self.reach, dtype=torch.int64)
        return MemoryState(torch.zeros(batch_size, dtype=torch.int64), ((text,),))

    def __call__(self, tokens: Tensor, state: MemoryState, labels: Tensor) -> Output:
        text = state.layers[0][0]
        nll = torch.zeros(tokens.shape)
        for stream, stream_labels in enumerate(labels.tolist()):
            if scored := [index for index, label in enumerate(stream_labels) if label != IGNORE_INDEX]:
                expected = bytes([*tokens[stream, : scored[-1] + 1].tolist(), stream_labels[scored[-1]]])
                known = bytes(token for token in text[stream].tolist() if token < 256)
                nll[stream, scored[-1]] = 0.0 if expected in known else 1.0
        self.num_tokens_read += tokens.numel()
        return Output(nll, MemoryState(state.position, ((torch.cat([text, tokens], 1)[:, -self.reach :],),)))


def remembers(reach: int) -> Any:
    return RememberingModel(reach)
