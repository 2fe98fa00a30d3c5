"""Models that answer from the text they have kept, for measures whose result is then known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtx.data.batch import IGNORE_INDEX
from memtx.state import MemoryState


@dataclass
class Said:
    nll: Tensor
    state: MemoryState


class KeepsText:
    """Keeps the last ``reach`` bytes; an answer costs nothing where they hold question and answer together."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.read = 0

    def init_state(self, rows: int) -> MemoryState:
        return MemoryState(torch.zeros(rows, dtype=torch.int64), ((torch.zeros(rows, self.reach, dtype=torch.int64),),))

    def __call__(self, tokens: Tensor, state: MemoryState, labels: Tensor) -> Said:
        kept = state.layers[0][0]
        nll = torch.zeros(tokens.shape)
        for row, line in enumerate(labels.tolist()):
            if asked := [at for at, label in enumerate(line) if label != IGNORE_INDEX]:
                wanted = bytes([*tokens[row, : asked[-1] + 1].tolist(), line[asked[-1]]])
                known = bytes(token for token in kept[row].tolist() if token < 256)
                nll[row, asked[-1]] = 0.0 if wanted in known else 1.0
        self.read += tokens.numel()
        return Said(nll, MemoryState(state.position, ((torch.cat([kept, tokens], 1)[:, -self.reach :],),)))


def keeps(reach: int) -> Any:
    return KeepsText(reach)
